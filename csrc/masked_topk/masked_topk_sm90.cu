// Launches masked_topk on the engine for sm_90a.
#include "engines/strip_sm90.cuh"
#include "masked_topk/masked_topk.cuh"

namespace hpk {

template <typename T>
void masked_topk_top1_sm90(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                           float* values, int64_t* indices, cudaStream_t stream) {
  launch_top1<WideSm90<T>>(WideSm90<T>::operands(query, pool), arguments, parts, values, indices, stream);
}

template <typename T>
void masked_topk_sm90(const Rows<T>& query, const Rows<T>& pool, const TopkArguments& arguments, int parts,
                      const int64_t* below, int64_t* keys, cudaStream_t stream) {
  launch_topk<StripSm90<T>>(StripSm90<T>::operands(query, pool), arguments, parts, below, keys, stream);
}

#define HPK_INSTANTIATE(T)                                                                                            \
  template void masked_topk_top1_sm90<T>(const Rows<T>&, const Rows<T>&, const TopkArguments&, int, float*, int64_t*, \
                                         cudaStream_t);                                                               \
  template void masked_topk_sm90<T>(const Rows<T>&, const Rows<T>&, const TopkArguments&, int, const int64_t*,        \
                                    int64_t*, cudaStream_t);
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
