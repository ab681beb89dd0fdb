// Launches the kernels of blocks on the engine for sm_90a.
#include "multi_positive_contrastive/blocks.cuh"

#include "engines/gradient_sm90.cuh"
#include "engines/strip_sm90.cuh"

namespace hpk {

template <typename T>
void contrastive_blocks_forward_sm90(const BlockPairs<T>& pairs, const float* square, float* parts,
                                     cudaStream_t stream) {
  launch_blocks_forward<StripSm90<T>>(StripSm90<T>::operands(pairs.z, pairs.z), pairs, square, parts, stream);
}

template <typename T>
void contrastive_blocks_backward_sm90(const BlockPairs<T>& pairs, const BlockSums& sums, cudaStream_t stream) {
  const auto run = [&](auto engine) {
    using Engine = decltype(engine);
    launch_blocks_backward<Engine>(Engine::operands(pairs.z, sums.numbers), pairs, sums, stream);
  };
  // The engine takes 128 and 384 as well; each length takes half a minute to compile.
  if (pairs.z.dim <= 256) return run(GradientSm90<T, 256>{});
  run(GradientSm90<T, 512>{});
}

#define HPK_INSTANTIATE(T)                                                                                       \
  template void contrastive_blocks_forward_sm90<T>(const BlockPairs<T>&, const float*, float*, cudaStream_t);    \
  template void contrastive_blocks_backward_sm90<T>(const BlockPairs<T>&, const BlockSums&, cudaStream_t);
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
