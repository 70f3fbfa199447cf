"""All that one wants to know of a GPU, in twelve minutes: `bench/run.py --mode gpu-report`.

command       the parts in turn, each in a process of its own; results are written after each
context       what a part is given: the device, its time, a clock, and where its results go
environment   machine, build, ceilings
commands      what other programs tell: self-test, tests, compute-sanitizer, ncu
layers        layers of real models, and tuning's grid
models        a training step and a session
page          one page, verdicts first
plots         the three plots
"""
