# Turns CUDA on: finds nvcc, chooses the architectures (no GPU is asked), enables the language.
#   CUDACXX or CUDA_HOME     which nvcc; otherwise that of PATH, then /usr/local/cuda
#   TORCH_CUDA_ARCH_LIST     as for PyTorch's own extensions, for example "8.0;9.0a;10.0+PTX"
# Sets HPKERNELS_ARCHITECTURES, the architectures as text.

if(NOT CMAKE_CUDA_COMPILER)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  elseif(NOT "$ENV{CUDA_HOME}" STREQUAL "")
    set(CMAKE_CUDA_COMPILER "$ENV{CUDA_HOME}/bin/nvcc")
  else()
    find_program(HPKERNELS_NVCC nvcc PATHS /usr/local/cuda/bin REQUIRED)
    set(CMAKE_CUDA_COMPILER "${HPKERNELS_NVCC}")
  endif()
endif()

string(REGEX REPLACE "[ ,]+" ";" architectures "$ENV{TORCH_CUDA_ARCH_LIST}")
if(NOT architectures)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(architectures 8.0 9.0a)
  if(known MATCHES "compute_100")
    list(APPEND architectures 10.0+PTX)
  else()
    list(APPEND architectures 9.0+PTX) # code for 9.0a runs on 9.0 alone, so it cannot be the PTX for later ones
  endif()
endif()

# CMake's own spelling: 80-real is code, 80-virtual is PTX, and 80 is both.
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(architecture IN LISTS architectures)
  if(NOT architecture MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must be numbers such as 8.0;9.0a;10.0+PTX, got ${architecture}")
  endif()
  set(kind "-real")
  if(CMAKE_MATCH_3)
    set(kind "")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${kind}")
endforeach()
list(JOIN architectures " " HPKERNELS_ARCHITECTURES)

enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
