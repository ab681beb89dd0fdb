// What the current CUDA device is and has.
#include "common/cuda.h"

#include <cstdlib>
#include <cstring>

#ifndef HPK_EMULATED
#include <cuda_runtime_api.h>
#endif

namespace hpk {

size_t most_shared_bytes() {
#ifdef HPK_EMULATED
  return has_sm90() ? 227 * 1024 : kSharedBytesAnywhere;
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    return 48 * 1024;
  }
  return static_cast<size_t>(bytes);
#endif
}

bool has_sm90() {
  const char* const choice = std::getenv("HPKERNELS_SM90");
#if defined(HPK_EMULATED) && defined(HPK_WITH_SM90)
  return choice != nullptr && std::strcmp(choice, "1") == 0;
#elif !defined(HPK_EMULATED) && defined(HPK_WITH_SM90)
  if (choice != nullptr && std::strcmp(choice, "0") == 0) return false;
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#else
  (void)choice;
  return false;
#endif
}

}  // namespace hpk
