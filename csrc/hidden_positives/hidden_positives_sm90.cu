#include "common/strip_sm90.cuh"
#include "hidden_positives/hidden_positives.cuh"
#include "hidden_positives/hidden_positives.h"

namespace hpk {

template <typename T>
void hidden_positives_sm90(const Rows<T>& features, const float* threshold, bool symmetric, uint32_t* bits,
                           cudaStream_t stream) {
  const auto operands = WideSm90<T>::operands(features, features);
  launch_hidden_positives<WideSm90<T>>(operands, {threshold, features.count, bits}, symmetric, stream);
}

template void hidden_positives_sm90<__half>(const Rows<__half>&, const float*, bool, uint32_t*, cudaStream_t);
template void hidden_positives_sm90<__nv_bfloat16>(const Rows<__nv_bfloat16>&, const float*, bool, uint32_t*, cudaStream_t);

}  // namespace hpk
