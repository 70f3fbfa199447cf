"""Writes appointments_train.jsonl and appointments_heldout.jsonl: chats that agree on something.

    python examples/data/make_appointments.py

The last answer of every row is `day | time | place`. The conversations are in
conversations_train.txt and conversations_heldout.txt, one turn a line, the user first. {day} {time}
{place} are what is agreed in the end; {day2} {time2} {place2} are mentioned and given up. The two
files share days of the week and the clock, but no conversation, place, name or wording of the
question.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

TRAIN_PLACES = [
    "the town library", "room 12", "Café Lindner", "the north entrance", "the dental clinic",
    "Harbour Street 4", "the old bakery", "the sports hall", "meeting room B", "the train station",
    "the botanical garden", "Anna's office", "the workshop", "the second floor kitchen",
    "the city museum", "the riverside park", "lab 3", "the post office", "the garage on Mill Road",
    "the school gym", "the market square", "the bike shop", "the community centre", "the bank",
]  # fmt: skip
HELDOUT_PLACES = [
    "the opera house", "room 407", "Pizzeria Roma", "the west gate", "the eye hospital",
    "Garden Lane 19", "the fire station", "the swimming pool", "the print shop", "studio 5",
    "the ferry terminal", "Professor Okafor's lab", "the concert hall", "the tailor on Elm Street",
    "the chess club", "the animal shelter",
]  # fmt: skip
TRAIN_NAMES = ["Marta", "Jonas", "Priya", "Felix", "Sofia", "Daniel", "Aiko", "Leon", "Clara"]
HELDOUT_NAMES = ["Ibrahim", "Greta", "Tomás", "Wen", "Nadia", "Oskar"]
TRAIN_QUESTIONS = [
    "Which appointment did we end up with? Answer as day | time | place.",
    "Write down the final appointment as: day | time | place",
    "Note the appointment. Format: day | time | place",
    "Give me the agreed day, time and place, separated by |.",
    "What should I put in my calendar? Use the form day | time | place.",
]
HELDOUT_QUESTIONS = [
    "Sum up the meeting we settled on in one line, as day | time | place.",
    "So when and where is it? Reply only with day | time | place.",
    "Fill in the reminder: day | time | place",
]


def rows(
    conversations: list[list[str]],
    places: list[str],
    names: list[str],
    questions: list[str],
    per_conversation: int,
    seed: int,
) -> list[dict[str, object]]:
    """Every conversation `per_conversation` times, each time with other values."""
    rng = random.Random(seed)
    result: list[dict[str, object]] = []
    for turns in conversations:
        for _ in range(per_conversation):
            day, day2 = rng.sample(DAYS, 2)
            time, time2 = (
                f"{h}:{rng.choice(('00', '15', '30', '45'))}" for h in rng.sample(range(8, 21), 2)
            )
            place, place2 = rng.sample(places, 2)
            values = {
                "day": day, "day2": day2, "time": time, "time2": time2,
                "place": place, "place2": place2, "name": rng.choice(names),
            }  # fmt: skip
            filled = [_sentence_case(turn.format(**values)) for turn in turns]
            question = rng.choice(questions)
            if len(filled) % 2:  # the user spoke last, so the question becomes part of that turn
                filled[-1] = f"{filled[-1]}\n{question}"
            else:
                filled.append(question)
            messages = [
                {"role": "assistant" if i % 2 else "user", "content": text}
                for i, text in enumerate(filled)
            ]
            messages.append({"role": "assistant", "content": f"{day} | {time} | {place}"})
            result.append({"messages": messages})
    rng.shuffle(result)
    return result


def _sentence_case(text: str) -> str:
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def conversations(path: Path) -> list[list[str]]:
    return [block.splitlines() for block in path.read_text(encoding="utf8").strip().split("\n\n")]


def main() -> None:
    here = Path(__file__).parent
    train = conversations(here / "conversations_train.txt")
    heldout = conversations(here / "conversations_heldout.txt")
    sets = {
        "appointments_train.jsonl": rows(train, TRAIN_PLACES, TRAIN_NAMES, TRAIN_QUESTIONS, 8, 1),
        "appointments_heldout.jsonl": rows(
            heldout, HELDOUT_PLACES, HELDOUT_NAMES, HELDOUT_QUESTIONS, 5, 2
        ),
    }
    for name, data in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
        (here / name).write_text(text, encoding="utf8")
        print(f"{name}: {len(data)} rows")


if __name__ == "__main__":
    main()
