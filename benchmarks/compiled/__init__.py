"""What compilers made of the kernels, read without a GPU: registers, spills, instructions, clocks."""
