// Launches the logits of local_propagation on the engine for sm_90a.
#include "engines/strip_sm90.cuh"
#include "local_propagation/logits.cuh"

namespace hpk {

template <typename T>
void local_propagation_logits_sm90(const Rows<T>& query, const Rows<T>& key, const LogitArguments& arguments,
                                   cudaStream_t stream) {
  // Two tiles at least: the strip is loaded before any product.
  launch_logits<StripSm90<T>>(StripSm90<T>::operands(query, key), arguments, 2, stream);
}

template void local_propagation_logits_sm90<__half>(const Rows<__half>&, const Rows<__half>&, const LogitArguments&,
                                                    cudaStream_t);
template void local_propagation_logits_sm90<__nv_bfloat16>(const Rows<__nv_bfloat16>&, const Rows<__nv_bfloat16>&,
                                                           const LogitArguments&, cudaStream_t);

}  // namespace hpk
