// Launches hidden_positives on the engine that the device and the rows have.
#include "engines/strip_sm80.cuh"
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

template <typename T>
void hidden_positives_between_cuda(const Rows<T>& features, const Rows<T>& keys, const BetweenArguments& arguments,
                                   bool either, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(features)) return hidden_positives_between_sm90(features, keys, arguments, either, stream);
  }
#endif
  launch_hidden_positives_between<StripSm80<T, Geometry80, true>>({features, keys}, arguments, either, stream);
}

#define HPK_INSTANTIATE(T)                                                                                      \
  template void hidden_positives_cuda<T>(const Rows<T>&, const float*, bool, uint32_t*, cudaStream_t);          \
  template void hidden_positives_between_cuda<T>(const Rows<T>&, const Rows<T>&, const BetweenArguments&, bool, \
                                                cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
