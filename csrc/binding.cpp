// The Python module alora_kernels._cuda: launches programs of kernels with the addresses of a call.
// It gets addresses, sizes and streams as integers, and knows nothing of torch.
#include <cuda_runtime.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "counters.h"
#include "fields.h"
#include "program.h"

namespace py = pybind11;

namespace alora {
namespace {

// Converts a `steps.Packed` of Python.
Launch launch_of(const py::object& told) {
  Launch launch;
  launch.name = told.attr("kernel").cast<std::string>();
  const auto grid = told.attr("grid").cast<std::vector<unsigned>>();
  for (int i = 0; i < 3; ++i) launch.grid[i] = grid.at(i);
  launch.block = told.attr("block").cast<unsigned>();
  launch.shared = told.attr("shared").cast<int>();
  launch.dependent = told.attr("dependent").cast<bool>();
  launch.cooperative = told.attr("cooperative").cast<bool>();
  launch.params = told.attr("data").cast<std::string>();
  for (const py::handle slot : told.attr("addresses")) {
    launch.addresses.push_back({slot.attr("offset").cast<size_t>(),
                                slot.attr("tensor").cast<size_t>(),
                                slot.attr("shift").cast<uint64_t>()});
  }
  for (const py::handle m : told.attr("maps")) {
    const Slot slot = {m.attr("offset").cast<size_t>(), m.attr("tensor").cast<size_t>(),
                       m.attr("shift").cast<uint64_t>()};
    launch.maps.push_back(
        {slot,
         {m.attr("is_bf16").cast<bool>(), m.attr("columns").cast<uint64_t>(),
          m.attr("rows").cast<uint64_t>(), m.attr("stride").cast<uint64_t>(),
          m.attr("box_columns").cast<uint32_t>(), m.attr("box_rows").cast<uint32_t>()}});
  }
  for (const py::handle slot : told.attr("counters")) {
    launch.counters.push_back(
        {slot.attr("offset").cast<size_t>(), slot.attr("words").cast<size_t>()});
  }
  return launch;
}

std::unique_ptr<Program> program_of(const py::iterable& launches, std::vector<int> residues) {
  std::vector<Launch> all;
  for (const py::handle launch : launches) {
    all.push_back(launch_of(py::reinterpret_borrow<py::object>(launch)));
  }
  return std::make_unique<Program>(std::move(all), std::move(residues));
}

Addresses addresses_of(const py::list& list) {
  const Py_ssize_t count = PyList_GET_SIZE(list.ptr());
  Addresses addresses(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    addresses[i] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(list.ptr(), i));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return addresses;
}

// Keeps the GIL, because nothing here waits for the device.
bool call(const Program& program, const py::list& list, int device, uintptr_t stream) {
  const Addresses addresses = addresses_of(list);
  if (!program.fits(addresses)) return false;
  program.run(addresses, device, reinterpret_cast<cudaStream_t>(stream));
  return true;
}

// What a call would pass to each launch: the parameter bytes without maps and counters, and the
// arguments of each map. For tests.
py::list parameters(const Program& program, const py::list& list) {
  const Addresses addresses = addresses_of(list);
  py::list found;
  if (!program.fits(addresses)) return found;
  for (const Launch& launch : program.launches()) {
    std::string bytes(launch.params.size(), '\0');
    Program::fill(launch, addresses, reinterpret_cast<unsigned char*>(bytes.data()));
    py::list maps;
    for (const MapSlot& m : launch.maps) {
      const MapShape& s = m.shape;
      maps.append(py::make_tuple(m.slot.offset, addresses[m.slot.tensor] + m.slot.shift, s.is_bf16,
                                 s.columns, s.rows, s.stride, s.box_columns, s.box_rows));
    }
    found.append(py::make_tuple(launch.name, py::bytes(bytes), maps));
  }
  return found;
}

py::tuple kernel_names() {
  py::list names;
  for (const auto& [name, function] : kernels()) names.append(py::str(name.data(), name.size()));
  names.attr("sort")();
  return py::tuple(names);
}

// (driver, runtime) as 1000 · major + 10 · minor; the driver is 0 if none is installed.
py::tuple versions() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = CUDART_VERSION;
  cudaGetLastError();  // clear the error: a missing driver is a valid answer here
  return py::make_tuple(driver, runtime);
}

// For each struct its size, and the kind and offset of each field. `params.Struct.exported` has the
// same form.
py::dict structs() {
  py::dict all;
  for (const Layout& layout : layouts()) {
    py::dict fields;
    for (const Field& f : layout.fields) {
      fields[py::str(f.name)] = py::make_tuple(std::string(1, f.kind), f.offset);
    }
    all[py::str(layout.name)] = py::make_tuple(layout.size, fields);
  }
  return all;
}

}  // namespace
}  // namespace alora

PYBIND11_MODULE(_cuda, module) {
  using namespace alora;
  module.doc() = "Launches the CUDA kernels of alora_kernels.";
  py::class_<Program>(module, "Program", "Launches that follow each other.")
      .def(py::init(&program_of), py::arg("launches"), py::arg("residues"))
      .def("__call__", &call, py::arg("addresses"), py::arg("device"), py::arg("stream"),
           "Launch; False, and nothing is launched, where an address is not aligned as planned.")
      .def("parameters", &parameters, py::arg("addresses"),
           "What a call would hand to each kernel, for tests.");
  py::class_<Counters>(module, "Counters", "Slices of zeroed memory; for tests.")
      .def(py::init<Counters::Allocate>(), py::arg("allocate"))
      .def(
          "take",
          [](Counters& counters, uint64_t stream, uint64_t capture, size_t words) {
            return counters.take({stream, capture}, words);
          },
          py::arg("stream"), py::arg("capture"), py::arg("words"));
  module.def("kernel_names", &kernel_names, "Names of all kernels, sorted.");
  module.def("versions", &versions, "(driver, runtime) as 1000 · major + 10 · minor.");
  module.attr("structs") = structs();
  module.attr("flags") = py::dict(py::cast(flag_bits()));
  module.attr("max_column_blocks") = kMaxColumnBlocks;
}
