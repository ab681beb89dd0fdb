#include "common/strip_sm80.cuh"
#include "hidden_positives/hidden_positives.cuh"
#include "hidden_positives/hidden_positives.h"

namespace hpk {

template <typename T>
void hidden_positives_cuda(const Rows<T>& features, const float* threshold, bool symmetric, uint32_t* bits,
                           cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(features)) return hidden_positives_sm90(features, threshold, symmetric, bits, stream);
  }
#endif
  launch_hidden_positives<StripSm80<T, Geometry80, true>>({features, features}, {threshold, features.count, bits},
                                                          symmetric, stream);
}

template void hidden_positives_cuda<float>(const Rows<float>&, const float*, bool, uint32_t*, cudaStream_t);
template void hidden_positives_cuda<__half>(const Rows<__half>&, const float*, bool, uint32_t*, cudaStream_t);
template void hidden_positives_cuda<__nv_bfloat16>(const Rows<__nv_bfloat16>&, const float*, bool, uint32_t*, cudaStream_t);

}  // namespace hpk
