// Launches the kernels of blocks on the engine that the device and the rows have.
#include "multi_positive_contrastive/blocks.cuh"

#include "engines/gradient_sm80.cuh"
#include "engines/strip_sm80.cuh"

namespace hpk {

int64_t contrastive_blocks_parts(int64_t anchors, int64_t group, bool within, int64_t first, int64_t rows) {
  const int64_t strips = strips_of(Geometry80::kRows, first % 32 + rows, group, within);
  return parts_for(strips, tiles_of(Geometry80::kColumns, anchors, group, within), kWantedBlocks, 2);
}

template <typename T>
void contrastive_blocks_forward_cuda(const BlockPairs<T>& pairs, const float* square, float* parts,
                                     cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(pairs.z)) return contrastive_blocks_forward_sm90(pairs, square, parts, stream);
  }
#endif
  launch_blocks_forward<StripSm80<T>>({pairs.z, pairs.z}, pairs, square, parts, stream);
}

template <typename T>
void contrastive_blocks_backward_cuda(const BlockPairs<T>& pairs, const BlockSums& sums, cudaStream_t stream) {
#ifdef HPK_WITH_SM90
  if constexpr (sizeof(T) == 2) {
    if (runs_on_sm90(pairs.z)) return contrastive_blocks_backward_sm90(pairs, sums, stream);
  }
#endif
  launch_blocks_backward<GradientSm80<T>>({pairs.z, pairs.z}, pairs, sums, stream);
}

#define HPK_INSTANTIATE(T)                                                                                       \
  template void contrastive_blocks_forward_cuda<T>(const BlockPairs<T>&, const float*, float*, cudaStream_t);    \
  template void contrastive_blocks_backward_cuda<T>(const BlockPairs<T>&, const BlockSums&, cudaStream_t);
HPK_INSTANTIATE(float)
HPK_INSTANTIATE(__half)
HPK_INSTANTIATE(__nv_bfloat16)
#undef HPK_INSTANTIATE

}  // namespace hpk
