// Launch signatures of local_propagation. All tensors are contiguous.
#pragma once

#include "common/cuda.h"
#include "common/parallel_for.h"

namespace hpk {

// Weights of `images` images from the attention logits, (G, G) each, of one image after the other:
//   T_ij = sigma * softmax_j(clamp(l_ij, quantiles of row i)), 0 where below the row's mean; divided by the number of
//   window cells inside the image. weights is (images, window * window, height, width).
template <typename T>
void local_propagation_weights_cpu(ParallelFor run, const T* logits, int64_t images, int64_t height, int64_t width,
                                   double sigma, double low, double high, int64_t window, T* weights);

// mixed_i = sum over the window of i of weights_ij code_j; code and mixed are (batch, dim, height, width).
template <typename T>
void local_propagation_apply_cpu(ParallelFor run, const T* code, const T* weights, int64_t batch, int64_t dim,
                                 int64_t height, int64_t width, int64_t window, T* mixed);

// The transpose: grad_code_j = sum over the i whose window holds j of weights_ij grad_mixed_i.
template <typename T>
void local_propagation_apply_backward_cpu(ParallelFor run, const T* grad_mixed, const T* weights, int64_t batch,
                                          int64_t dim, int64_t height, int64_t width, int64_t window, T* grad_code);

// Images whose tokens are rows, `tokens` for each: first `prefix` that are no patches, then height * width that are.
struct WeightsShape {
  int64_t images, tokens, prefix, height, width, window;
  int64_t pitch;  // of a row of logits in the workspace, even
};

// Each image is cut into strips of so many patches, the last of which may be smaller.
constexpr int kLogitStripRows = 128;

// Such strips, one image after another; `logits` has those from `first` on.
struct LogitStrips {
  int patches, per_image, first, count;
  int pitch;  // of a row of logits
  float* logits;
};

struct LogitArguments {
  LogitStrips strips;
  int64_t tokens, prefix;  // of an image, and those that are no patches
  float scale;
};

// The logits for sm_90a, rows of up to kMostSm90Bytes; for __half and __nv_bfloat16.
template <typename T>
void local_propagation_logits_sm90(const Rows<T>& query, const Rows<T>& key, const LogitArguments& arguments,
                                   cudaStream_t stream);

// The weights on the GPU of the patches in the strips [first, last), with the logits scale * <query, key> of rows that
// have all heads side by side. `logits` is a workspace for that many strips.
template <typename T>
void local_propagation_weights_cuda(const Rows<T>& query, const Rows<T>& key, const WeightsShape& shape, int64_t first,
                                    int64_t last, double scale, double sigma, double low, double high, float* logits,
                                    float* weights, cudaStream_t stream);

// The stencil and its transpose on the GPU, for float, __half and __nv_bfloat16. Cells outside the image count as 0,
// whatever the weights there.
template <typename T>
void local_propagation_apply_cuda(const T* code, const float* weights, int64_t batch, int64_t dim, int64_t height,
                                  int64_t width, int64_t window, T* mixed, cudaStream_t stream);

template <typename T>
void local_propagation_apply_backward_cuda(const T* grad_mixed, const float* weights, int64_t batch, int64_t dim,
                                           int64_t height, int64_t width, int64_t window, T* grad_code,
                                           cudaStream_t stream);

}  // namespace hpk
