// Registers the CUDA kernels with PyTorch through its stable ABI. Shapes, dtypes, devices and contiguity are the callers'
// part (hpkernels/ops/<op>/cuda.py): nothing here is public.
#include "hidden_positives/hidden_positives.h"
#include "local_propagation/local_propagation.h"
#include "masked_topk/masked_topk_cuda.h"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"
#include "torch_cuda.h"

// `python -m hpkernels` finds this text in the file, so that it can tell what was built where the library cannot load.
extern "C" __attribute__((used)) const char hpkernels_architectures[] = "hpkernels architectures: " HPK_ARCHITECTURES;

namespace {

using namespace hpk;

void hidden_positives(Tensor features, Tensor threshold, Tensor bits) {
  const OnDeviceOf on(features);
  if (threshold.numel() % kThresholdsTogether != 0 || threshold.numel() < features.size(0)) {
    throw std::runtime_error("hpkernels: the thresholds must be padded with NaN");
  }
  with_type_of(features, [&](auto zero) {
    using T = decltype(zero);
    hidden_positives_cuda(rows<T>(features), data<float>(threshold), data<uint32_t>(bits), on.stream);
  });
}

int64_t window_of(const Tensor& weights) {
  int64_t window = 1;
  while (window * window < weights.size(1)) ++window;
  return window;
}

void local_propagation_weights(Tensor query, Tensor key, int64_t prefix, int64_t first, int64_t last, double scale,
                               double sigma, double low, double high, Tensor logits, Tensor weights) {
  const OnDeviceOf on(query);
  const int64_t images = weights.size(0);
  const WeightsShape shape{images,          query.size(0) / images, prefix,        weights.size(2),
                           weights.size(3), window_of(weights),     logits.size(1)};
  with_type_of(query, [&](auto zero) {
    using T = decltype(zero);
    local_propagation_weights_cuda(rows<T>(query), rows<T>(key), shape, first, last, scale, sigma, low, high,
                                   data<float>(logits), data<float>(weights), on.stream);
  });
}

TopkArguments topk_arguments(const Tensor& query, const Tensor& pool, int64_t k, const std::optional<Tensor>& mask,
                             const std::optional<Tensor>& query_group, const std::optional<Tensor>& pool_group) {
  const TopkRestrictions restrictions{data<bool>(mask), mask.has_value() ? mask->stride(0) : 0,
                                      mask.has_value() ? mask->stride(1) : 0, data<int64_t>(query_group),
                                      data<int64_t>(pool_group)};
  return {restrictions, static_cast<int>(query.size(0)), static_cast<int>(pool.size(0)), static_cast<int>(k)};
}

void masked_topk_top1(Tensor query, Tensor pool, Tensor values, Tensor indices) {
  const OnDeviceOf on(query);
  with_type_of(query, [&](auto zero) {
    using T = decltype(zero);
    masked_topk_top1_cuda(rows<T>(query), rows<T>(pool), topk_arguments(query, pool, 1, {}, {}, {}),
                          static_cast<int>(values.size(1)), data<float>(values), data<int64_t>(indices), on.stream);
  });
}

// below (queries), keys (queries, parts, k)
void masked_topk(Tensor query, Tensor pool, std::optional<Tensor> mask, std::optional<Tensor> query_group,
                 std::optional<Tensor> pool_group, std::optional<Tensor> below, Tensor keys) {
  const OnDeviceOf on(query);
  with_type_of(query, [&](auto zero) {
    using T = decltype(zero);
    masked_topk_cuda(rows<T>(query), rows<T>(pool),
                     topk_arguments(query, pool, keys.size(2), mask, query_group, pool_group),
                     static_cast<int>(keys.size(1)), data<int64_t>(below), data<int64_t>(keys), on.stream);
  });
}

// grad_query (queries, dim), of the rows as the kernels read them
void masked_topk_query_backward(Tensor pool, Tensor indices, Tensor grad_values, Tensor grad_query) {
  const OnDeviceOf on(pool);
  with_type_of(pool, [&](auto zero) {
    using T = decltype(zero);
    masked_topk_query_backward_cuda(rows<T>(pool), data<int64_t>(indices), data<float>(grad_values), indices.size(0),
                                    static_cast<int>(indices.size(1)), data<T>(grad_query), on.stream);
  });
}

// sums (parts, references, dim), likewise
void masked_topk_pool_backward(Tensor query, Tensor order, Tensor first, Tensor grad_values, Tensor sums) {
  const OnDeviceOf on(query);
  with_type_of(query, [&](auto zero) {
    using T = decltype(zero);
    masked_topk_pool_backward_cuda(rows<T>(query), data<int64_t>(order), data<int64_t>(first),
                                   data<float>(grad_values), sums.size(1), static_cast<int>(grad_values.size(1)),
                                   static_cast<int>(sums.size(0)), data<float>(sums), on.stream);
  });
}

template <bool backward>
void local_propagation_stencil(const Tensor& input, const Tensor& weights, const Tensor& output) {
  const OnDeviceOf on(input);
  with_type_of(input, [&](auto zero) {
    using T = decltype(zero);
    const auto stencil = backward ? local_propagation_apply_backward_cuda<T> : local_propagation_apply_cuda<T>;
    stencil(data<T>(input), data<float>(weights), input.size(0), input.size(1), input.size(2), input.size(3),
            window_of(weights), data<T>(output), on.stream);
  });
}

void local_propagation_apply(Tensor code, Tensor weights, Tensor mixed) {
  local_propagation_stencil<false>(code, weights, mixed);
}

void local_propagation_apply_backward(Tensor grad_mixed, Tensor weights, Tensor grad_code) {
  local_propagation_stencil<true>(grad_mixed, weights, grad_code);
}

void contrastive_draw_negatives(Tensor seed, int64_t columns, int64_t threshold, Tensor bits, Tensor counts) {
  const OnDeviceOf on(bits);
  draw_negatives_cuda(data<int64_t>(seed), static_cast<uint64_t>(threshold), bits.size(0), columns,
                      data<uint32_t>(bits), data<int32_t>(counts), on.stream);
}

void contrastive_transpose_bits(Tensor bits, Tensor transposed) {
  const OnDeviceOf on(bits);
  transpose_bits_cuda(data<uint32_t>(bits), bits.size(0), transposed.size(0), data<uint32_t>(transposed), on.stream);
}

BitRows bit_rows(const Tensor& first, const std::optional<Tensor>& second, int64_t group) {
  return {data<uint32_t>(first), data<uint32_t>(second), first.size(0), first.size(1), first.stride(0), group};
}

void contrastive_count_bits(Tensor first, std::optional<Tensor> second, int64_t group, Tensor counts) {
  const OnDeviceOf on(first);
  count_bits_cuda(bit_rows(first, second, group), data<int32_t>(counts), on.stream);
}

void contrastive_list_offsets(Tensor counts, int64_t capacity, Tensor offsets, std::optional<Tensor> enabled) {
  const OnDeviceOf on(counts);
  list_offsets_cuda(data<int32_t>(counts), counts.size(0), capacity, data<int64_t>(offsets), data<int32_t>(enabled),
                    on.stream);
}

void contrastive_list_bits(Tensor first, std::optional<Tensor> second, int64_t group, Tensor offsets, Tensor enabled,
                           Tensor columns) {
  const OnDeviceOf on(first);
  list_bits_cuda(bit_rows(first, second, group), data<int64_t>(offsets), data<int32_t>(enabled), columns.size(0),
                 data<int32_t>(columns), on.stream);
}

template <typename T>
ListedPairs<T> listed_pairs(const Tensor& z, const Tensor& positives, const std::optional<Tensor>& specific,
                            const Tensor& negatives, const Tensor& columns, const Tensor& offsets,
                            const Tensor& enabled, double scale) {
  return {rows<T>(z),           data<uint32_t>(positives), data<uint32_t>(specific), data<uint32_t>(negatives),
          negatives.size(0),    data<int32_t>(columns),    data<int64_t>(offsets),   data<int32_t>(enabled),
          static_cast<float>(scale)};
}

void contrastive_pairs_forward(Tensor z, Tensor positives, std::optional<Tensor> specific, Tensor negatives,
                               Tensor columns, Tensor offsets, Tensor enabled, double scale, Tensor part) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_pairs_forward_cuda(
        listed_pairs<T>(z, positives, specific, negatives, columns, offsets, enabled, scale), data<float>(part),
        on.stream);
  });
}

void contrastive_pairs_backward(Tensor z, Tensor positives, std::optional<Tensor> specific, Tensor negatives,
                                Tensor columns, Tensor offsets, Tensor enabled, double scale, Tensor numbers,
                                Tensor grad) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_pairs_backward_cuda(
        listed_pairs<T>(z, positives, specific, negatives, columns, offsets, enabled, scale), data<float>(numbers),
        data<float>(grad), grad.size(1), grad.stride(0), on.stream);
  });
}

template <typename T>
BlockPairs<T> block_pairs(const Tensor& z, const Tensor& positives, const std::optional<Tensor>& specific,
                          const std::optional<Tensor>& negatives, int64_t group, bool within, const Tensor& enabled,
                          double scale) {
  const ContrastiveMasks masks{data<uint32_t>(positives), data<uint32_t>(specific), data<uint32_t>(negatives),
                               static_cast<int>(z.size(0)), static_cast<int>(group)};
  return {rows<T>(z), masks, within, data<int32_t>(enabled), static_cast<float>(scale)};
}

void contrastive_blocks_forward(Tensor z, Tensor positives, std::optional<Tensor> specific,
                                std::optional<Tensor> negatives, int64_t group, bool within, Tensor enabled,
                                double scale, Tensor parts) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_blocks_forward_cuda(block_pairs<T>(z, positives, specific, negatives, group, within, enabled, scale),
                                    data<float>(parts), on.stream);
  });
}

void contrastive_blocks_backward(Tensor z, Tensor positives, std::optional<Tensor> specific,
                                 std::optional<Tensor> negatives, int64_t group, bool within, Tensor enabled,
                                 double scale, bool symmetric, Tensor numbers, Tensor grad) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_blocks_backward_cuda(block_pairs<T>(z, positives, specific, negatives, group, within, enabled, scale),
                                     symmetric, data<float>(numbers), data<float>(grad),
                                     static_cast<int>(grad.size(1)), on.stream);
  });
}

template <typename T>
SampledPairs<T> sampled_pairs(const Tensor& z, int64_t group, const Tensor& columns, const Tensor& offsets,
                              const Tensor& enabled, double scale) {
  return {rows<T>(z), group, data<int32_t>(columns), data<int64_t>(offsets), data<int32_t>(enabled),
          static_cast<float>(scale)};
}

void contrastive_sampled_forward(Tensor z, int64_t group, Tensor columns, Tensor offsets, Tensor enabled, double scale,
                                 Tensor log_sums) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_sampled_forward_cuda(sampled_pairs<T>(z, group, columns, offsets, enabled, scale),
                                     data<float>(log_sums), on.stream);
  });
}

void contrastive_sampled_rows_backward(Tensor z, int64_t group, Tensor columns, Tensor offsets, Tensor enabled,
                                       double scale, Tensor numbers, Tensor grad) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_sampled_rows_backward_cuda(sampled_pairs<T>(z, group, columns, offsets, enabled, scale),
                                           data<float>(numbers), data<float>(grad), static_cast<int>(grad.size(1)),
                                           on.stream);
  });
}

// The columns of the positions [32 first_word, 32 first_word + count), and their gradients.
void contrastive_sampled_columns_backward(Tensor z, int64_t group, Tensor columns, Tensor offsets, Tensor enabled,
                                          double scale, Tensor numbers, Tensor positions, Tensor slots,
                                          int64_t first_word, int64_t count, Tensor staged, Tensor grad) {
  const OnDeviceOf on(z);
  const StagedGradients gradients{data<uint32_t>(positions), data<int64_t>(slots), positions.size(1), first_word, count,
                                  staged.size(0), data<float>(staged), static_cast<int>(staged.size(1))};
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_sampled_columns_backward_cuda(sampled_pairs<T>(z, group, columns, offsets, enabled, scale),
                                              data<float>(numbers), gradients, on.stream);
  });
  contrastive_sampled_gather_cuda(gradients, data<int32_t>(enabled), z.size(0), data<float>(grad), on.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY(hpkernels_cuda, m) {
  m.def("hidden_positives(Tensor features, Tensor threshold, Tensor(a!) bits) -> ()");
  m.def("local_propagation_weights(Tensor query, Tensor key, int prefix, int first, int last, float scale, "
        "float sigma, float low, float high, Tensor(a!) logits, Tensor(b!) weights) -> ()");
  m.def("masked_topk_parts(int queries, int references) -> int");
  m.def("masked_topk_top1(Tensor query, Tensor pool, Tensor(a!) values, Tensor(b!) indices) -> ()");
  m.def("masked_topk(Tensor query, Tensor pool, Tensor? mask, Tensor? query_group, Tensor? pool_group, Tensor? below, "
        "Tensor(a!) keys) -> ()");
  m.def("masked_topk_query_backward(Tensor pool, Tensor indices, Tensor grad_values, Tensor(a!) grad_query) -> ()");
  m.def("masked_topk_pool_backward(Tensor query, Tensor order, Tensor first, Tensor grad_values, Tensor(a!) sums) "
        "-> ()");
  m.def("local_propagation_apply(Tensor code, Tensor weights, Tensor(a!) mixed) -> ()");
  m.def("local_propagation_apply_backward(Tensor grad_mixed, Tensor weights, Tensor(a!) grad_code) -> ()");
  m.def("contrastive_draw_negatives(Tensor seed, int columns, int threshold, Tensor(a!) bits, Tensor(b!) counts) "
        "-> ()");
  m.def("contrastive_transpose_bits(Tensor bits, Tensor(a!) transposed) -> ()");
  m.def("contrastive_count_bits(Tensor first, Tensor? second, int group, Tensor(a!) counts) -> ()");
  m.def("contrastive_list_offsets(Tensor counts, int capacity, Tensor(a!) offsets, Tensor(b!)? enabled) -> ()");
  m.def("contrastive_list_bits(Tensor first, Tensor? second, int group, Tensor offsets, Tensor enabled, "
        "Tensor(a!) columns) -> ()");
  m.def("contrastive_pairs_forward(Tensor z, Tensor positives, Tensor? specific, Tensor negatives, Tensor columns, "
        "Tensor offsets, Tensor enabled, float scale, Tensor(a!) part) -> ()");
  m.def("contrastive_pairs_backward(Tensor z, Tensor positives, Tensor? specific, Tensor negatives, Tensor columns, "
        "Tensor offsets, Tensor enabled, float scale, Tensor numbers, Tensor(a!) grad) -> ()");
  m.def("contrastive_blocks_parts(int anchors, int group, bool within) -> int");
  m.def("contrastive_blocks_forward(Tensor z, Tensor positives, Tensor? specific, Tensor? negatives, int group, "
        "bool within, Tensor enabled, float scale, Tensor(a!) parts) -> ()");
  m.def("contrastive_blocks_backward(Tensor z, Tensor positives, Tensor? specific, Tensor? negatives, int group, "
        "bool within, Tensor enabled, float scale, bool symmetric, Tensor numbers, Tensor(a!) grad) -> ()");
  m.def("contrastive_sampled_forward(Tensor z, int group, Tensor columns, Tensor offsets, Tensor enabled, float scale, "
        "Tensor(a!) log_sums) -> ()");
  m.def("contrastive_sampled_rows_backward(Tensor z, int group, Tensor columns, Tensor offsets, Tensor enabled, "
        "float scale, Tensor numbers, Tensor(a!) grad) -> ()");
  m.def("contrastive_sampled_columns_backward(Tensor z, int group, Tensor columns, Tensor offsets, Tensor enabled, "
        "float scale, Tensor numbers, Tensor positions, Tensor slots, int first_word, int count, Tensor(a!) staged, "
        "Tensor(b!) grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hpkernels_cuda, HPK_DISPATCH_KEY, m) {
  m.impl("hidden_positives", TORCH_BOX(&hidden_positives));
  m.impl("local_propagation_weights", TORCH_BOX(&local_propagation_weights));
  m.impl("masked_topk_top1", TORCH_BOX(&masked_topk_top1));
  m.impl("masked_topk", TORCH_BOX(&masked_topk));
  m.impl("masked_topk_query_backward", TORCH_BOX(&masked_topk_query_backward));
  m.impl("masked_topk_pool_backward", TORCH_BOX(&masked_topk_pool_backward));
  m.impl("local_propagation_apply", TORCH_BOX(&local_propagation_apply));
  m.impl("local_propagation_apply_backward", TORCH_BOX(&local_propagation_apply_backward));
  m.impl("contrastive_draw_negatives", TORCH_BOX(&contrastive_draw_negatives));
  m.impl("contrastive_transpose_bits", TORCH_BOX(&contrastive_transpose_bits));
  m.impl("contrastive_count_bits", TORCH_BOX(&contrastive_count_bits));
  m.impl("contrastive_list_offsets", TORCH_BOX(&contrastive_list_offsets));
  m.impl("contrastive_list_bits", TORCH_BOX(&contrastive_list_bits));
  m.impl("contrastive_pairs_forward", TORCH_BOX(&contrastive_pairs_forward));
  m.impl("contrastive_pairs_backward", TORCH_BOX(&contrastive_pairs_backward));
  m.impl("contrastive_blocks_forward", TORCH_BOX(&contrastive_blocks_forward));
  m.impl("contrastive_blocks_backward", TORCH_BOX(&contrastive_blocks_backward));
  m.impl("contrastive_sampled_forward", TORCH_BOX(&contrastive_sampled_forward));
  m.impl("contrastive_sampled_rows_backward", TORCH_BOX(&contrastive_sampled_rows_backward));
  m.impl("contrastive_sampled_columns_backward", TORCH_BOX(&contrastive_sampled_columns_backward));
}

STABLE_TORCH_LIBRARY_IMPL(hpkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("masked_topk_parts", TORCH_BOX(&hpk::masked_topk_parts));
  m.impl("contrastive_blocks_parts", TORCH_BOX(&hpk::contrastive_blocks_parts));
}
