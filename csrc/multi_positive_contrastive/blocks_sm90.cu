#include "multi_positive_contrastive/blocks.cuh"

#include "common/gradient_sm90.cuh"
#include "common/strip_sm90.cuh"

namespace hpk {

template <typename T>
void contrastive_blocks_forward_sm90(const BlockPairs<T>& pairs, float* parts, cudaStream_t stream) {
  launch_blocks_forward<StripSm90<T>>(StripSm90<T>::operands(pairs.z, pairs.z), pairs, parts, stream);
}

template <typename T>
void contrastive_blocks_backward_sm90(const BlockPairs<T>& pairs, bool symmetric, const float* numbers, float* grad,
                                      int dim, cudaStream_t stream) {
  const auto run = [&](auto engine) {
    using Engine = decltype(engine);
    launch_blocks_backward<Engine>(Engine::operands(pairs.z), pairs, symmetric, numbers, grad, dim, stream);
  };
  // The engine takes 128 and 384 as well; each length takes half a minute to compile.
  if (pairs.z.dim <= 256) return run(GradientSm90<T, 256>{});
  run(GradientSm90<T, 512>{});
}

#define HPK_INSTANTIATE(T)                                                                                           \
  template void contrastive_blocks_forward_sm90<T>(const BlockPairs<T>&, float*, cudaStream_t);                      \
  template void contrastive_blocks_backward_sm90<T>(const BlockPairs<T>&, bool, const float*, float*, int, cudaStream_t);
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
