# Turns CUDA on: finds nvcc, chooses the architectures (no GPU is asked), enables the language, finds CUTLASS.
#   CUDACXX or CUDA_HOME     which nvcc; otherwise that of PATH, then /usr/local/cuda
#   TORCH_CUDA_ARCH_LIST     as for PyTorch's own extensions, for example "8.0;9.0a;10.0+PTX"; older than 8.0 is left out
#   -DHPKERNELS_CUTLASS      where CUTLASS is; otherwise where the system keeps headers
# Sets HPKERNELS_ARCHITECTURES, what is compiled for and by what, as text, and HPKERNELS_CUTLASS_INCLUDE, the headers for
# kernels for sm_90a, or nothing if these are not to be built.

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

string(REGEX REPLACE "[ ,]+" ";" wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
if(NOT wanted)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  set(wanted 8.0 9.0a)
  if(known MATCHES "compute_100")
    list(APPEND wanted 10.0+PTX)
  else()
    list(APPEND wanted 9.0+PTX) # code for 9.0a runs on 9.0 alone, so it cannot be the PTX for later ones
  endif()
endif()

# CMake's own spelling: 80-real is code, 80-virtual is PTX, and 80 is both.
set(architectures "")
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(architecture IN LISTS wanted)
  if(NOT architecture MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must be numbers such as 8.0;9.0a;10.0+PTX, got ${architecture}")
  endif()
  if(CMAKE_MATCH_1 LESS 8)
    message(STATUS "Not for ${architecture}: the kernels need 8.0 or newer")
    continue()
  endif()
  set(kind "-real")
  if(CMAKE_MATCH_3)
    set(kind "")
  endif()
  list(APPEND architectures "${architecture}")
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${kind}")
endforeach()
if(NOT architectures)
  message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must have 8.0 or newer, got $ENV{TORCH_CUDA_ARCH_LIST}")
endif()

enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

list(JOIN architectures " " HPKERNELS_ARCHITECTURES)
string(APPEND HPKERNELS_ARCHITECTURES " by nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

include(${CMAKE_CURRENT_LIST_DIR}/cutlass.cmake)
set(HPKERNELS_CUTLASS_INCLUDE "")
if(architectures MATCHES "(^|;)9\\.0")
  if(HPKERNELS_CUTLASS)
    find_cutlass("${HPKERNELS_CUTLASS}" HPKERNELS_CUTLASS_INCLUDE)
    if(NOT HPKERNELS_CUTLASS_INCLUDE)
      message(FATAL_ERROR "HPKERNELS_CUTLASS must be the headers of CUTLASS 4, the folder that has them as include, "
                          "or a wheel of nvidia-cutlass, got ${HPKERNELS_CUTLASS}")
    endif()
  else()
    find_path(folder cute/tensor.hpp PATHS /usr/local/cutlass/include /opt/cutlass/include NO_CACHE)
    find_cutlass("${folder}" HPKERNELS_CUTLASS_INCLUDE)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.5) # which finds the driver's functions for TMA
    set(HPKERNELS_CUTLASS_INCLUDE "")
    string(APPEND HPKERNELS_ARCHITECTURES ", without wgmma: built with nvcc before 12.5")
  elseif(HPKERNELS_CUTLASS_INCLUDE)
    message(STATUS "Kernels for sm_90a (wgmma) with CUTLASS in ${HPKERNELS_CUTLASS_INCLUDE}")
  else()
    string(APPEND HPKERNELS_ARCHITECTURES ", without wgmma: built without nvidia-cutlass")
  endif()
endif()
message(STATUS "CUDA kernels for ${HPKERNELS_ARCHITECTURES}")
