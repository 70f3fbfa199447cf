"""The self-test: every kernel once against the reference, in a process of its own.

cases     what is run: data, a function of the GPU's size
check     one case by a backend, compared with the reference
worker    the process that runs cases and tells of each
process   starts workers, and knows what became of a case whose worker crashed or hung
verdict   what a GPU, driver and build have passed, kept in a file; what dispatch asks for
planned   which kernels the cases would launch, without a GPU
command   `python -m alora_kernels selftest`
"""
