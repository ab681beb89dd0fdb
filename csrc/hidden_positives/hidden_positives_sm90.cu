// Launches hidden_positives on the engine for sm_90a.
#include "engines/strip_sm90.cuh"
#include "hidden_positives/hidden_positives.cuh"
#include "hidden_positives/hidden_positives.h"

namespace hpk {

template <typename T>
void hidden_positives_sm90(const Rows<T>& features, const float* threshold, bool symmetric, uint32_t* bits,
                           cudaStream_t stream) {
  const auto operands = WideSm90<T>::operands(features, features);
  launch_hidden_positives<WideSm90<T>>(operands, {threshold, features.count, bits}, symmetric, stream);
}

template <typename T>
void hidden_positives_between_sm90(const Rows<T>& features, const Rows<T>& keys, const BetweenArguments& arguments,
                                   bool either, cudaStream_t stream) {
  launch_hidden_positives_between<WideSm90<T>>(WideSm90<T>::operands(features, keys), arguments, either, stream);
}

#define HPK_INSTANTIATE(T)                                                                                      \
  template void hidden_positives_sm90<T>(const Rows<T>&, const float*, bool, uint32_t*, cudaStream_t);          \
  template void hidden_positives_between_sm90<T>(const Rows<T>&, const Rows<T>&, const BetweenArguments&, bool, \
                                                cudaStream_t);
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
