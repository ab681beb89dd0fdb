// Registers the CUDA kernels with PyTorch through its stable ABI. Shapes, dtypes, devices and contiguity are the callers'
// part (hpkernels/ops/<op>/cuda.py): nothing here is public.
#include "hidden_positives/hidden_positives.h"
#include "local_propagation/local_propagation.h"
#include "masked_topk/masked_topk.h"
#include "multi_positive_contrastive/multi_positive_contrastive_cuda.h"
#include "torch_cuda.h"

// `python -m hpkernels` finds this text in the file, so that it can tell what was built where the library cannot load.
extern "C" __attribute__((used)) const char hpkernels_architectures[] = "hpkernels architectures: " HPK_ARCHITECTURES;

namespace {

using namespace hpk;

const float* padded_thresholds(const Tensor& threshold, const Tensor& rows) {
  if (threshold.numel() % kThresholdsTogether != 0 || threshold.numel() < rows.size(0)) {
    throw std::runtime_error("hpkernels: the thresholds must be padded with NaN");
  }
  return data<float>(threshold);
}

void hidden_positives(Tensor features, Tensor threshold, bool symmetric, Tensor bits) {
  const OnDeviceOf on(features);
  const float* const thresholds = padded_thresholds(threshold, features);
  with_type_of(features, [&](auto zero) {
    using T = decltype(zero);
    hidden_positives_cuda(rows<T>(features), thresholds, symmetric, data<uint32_t>(bits), on.stream);
  });
}

void hidden_positives_between(Tensor features, Tensor keys, Tensor threshold, Tensor key_threshold, bool either,
                              int64_t first, Tensor bits) {
  const OnDeviceOf on(features);
  const BetweenArguments arguments{padded_thresholds(threshold, features), padded_thresholds(key_threshold, keys),
                                   features.size(0),                       keys.size(0),
                                   static_cast<int>(first),                data<uint32_t>(bits)};
  with_type_of(features, [&](auto zero) {
    using T = decltype(zero);
    hidden_positives_between_cuda(rows<T>(features), rows<T>(keys), arguments, either, on.stream);
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

void contrastive_draw_negatives(Tensor seed, int64_t columns, int64_t threshold, Tensor bits) {
  const OnDeviceOf on(bits);
  draw_negatives_cuda(data<int64_t>(seed), static_cast<uint64_t>(threshold), bits.size(0), columns,
                      data<uint32_t>(bits), on.stream);
}

// What `state` (5 + stages,) counts: see Pairs of hpkernels/ops/multi_positive_contrastive/routes.py.
struct State {
  int64_t *does_not_fit, *images, *listed, *sampled, *slots;

  explicit State(const Tensor& state) : does_not_fit(data<int64_t>(state)) {
    images = does_not_fit + 1;
    listed = does_not_fit + 3;
    sampled = does_not_fit + 4;
    slots = does_not_fit + 5;
  }
};

ListedRows listed_rows(const Tensor& ranges, const Tensor& columns, int64_t* taken, const State& state) {
  return {data<int64_t>(ranges), data<int32_t>(columns), columns.size(0), taken, state.does_not_fit};
}

void contrastive_list_sampled(Tensor negatives, int64_t anchors, Tensor state, int64_t stage_columns,
                              int64_t slot_capacity, Tensor transposed, Tensor slot_ranges, Tensor ranges, Tensor columns,
                              Tensor slots) {
  const OnDeviceOf on(negatives);
  const State counters(state);
  const Slots places{data<int64_t>(slot_ranges), data<int32_t>(slots), stage_columns, slot_capacity, counters.slots};
  list_sampled_cuda(data<uint32_t>(negatives), negatives.size(0), anchors, data<uint32_t>(transposed), places,
                    listed_rows(ranges, columns, counters.sampled, counters), on.stream);
}

void contrastive_count_and_list(Tensor positives, std::optional<Tensor> specific, std::optional<Tensor> negatives,
                                int64_t anchors, int64_t group, int64_t first, Tensor state, Tensor counts,
                                std::optional<Tensor> ranges, std::optional<Tensor> columns) {
  const OnDeviceOf on(positives);
  const State counters(state);
  const PairBits bits{data<uint32_t>(positives), data<uint32_t>(specific), data<uint32_t>(negatives), anchors, group,
                      first, positives.size(0)};
  const ListedRows rows = ranges.has_value() ? listed_rows(*ranges, *columns, counters.listed, counters) : ListedRows{};
  count_and_list_cuda(bits, data<int32_t>(counts), rows, on.stream);
}

void contrastive_weigh(Tensor counts, Tensor specific_weight, int64_t group, bool joint, bool reweight,
                       bool keep_specific_only, Tensor weights, Tensor state) {
  const OnDeviceOf on(counts);
  weigh_cuda(data<int32_t>(counts), counts.size(0), group, data<float>(specific_weight),
             {joint, reweight, keep_specific_only}, data<float>(weights), State(state).images, on.stream);
}

void contrastive_greatest_square(Tensor z, Tensor greatest) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    greatest_square_cuda(rows<T>(z), data<float>(greatest), on.stream);
  });
}

void contrastive_scale_rows(Tensor rows, Tensor greatest, Tensor lowest, Tensor highest, Tensor grad_losses,
                            double temperature, double greatest_g, double most_apart, Tensor numbers, Tensor shifts,
                            Tensor factors) {
  const OnDeviceOf on(rows);
  scale_rows_cuda({data<float>(rows), data<float>(greatest), data<float>(lowest), data<float>(highest),
                   data<float>(grad_losses), rows.size(0), rows.size(1), static_cast<float>(temperature),
                   static_cast<float>(greatest_g), static_cast<float>(most_apart), data<float>(numbers),
                   data<float>(shifts), data<float>(factors)},
                  on.stream);
}

template <typename T>
ListedPairs<T> listed_pairs(const Tensor& z, const Tensor& positives, const std::optional<Tensor>& specific,
                            const std::optional<Tensor>& negatives, int64_t group, const Tensor& state,
                            const std::optional<Tensor>& ranges, const std::optional<Tensor>& columns, double scale) {
  return {rows<T>(z),
          data<uint32_t>(positives),
          data<uint32_t>(specific),
          data<uint32_t>(negatives),
          group,
          data<int64_t>(state),
          data<int64_t>(ranges),
          data<int32_t>(columns),
          static_cast<float>(scale)};
}

void contrastive_rows_forward(Tensor z, Tensor positives, std::optional<Tensor> specific,
                              std::optional<Tensor> negatives, int64_t group, Tensor weights, Tensor state,
                              std::optional<Tensor> ranges, std::optional<Tensor> columns, double scale,
                              double loss_scale, Tensor square, Tensor parts, std::optional<Tensor> within,
                              std::optional<Tensor> log_sums, Tensor rows, Tensor losses) {
  const OnDeviceOf on(z);
  const RowParts of_rows{data<float>(weights),
                         static_cast<float>(loss_scale),
                         data<float>(square),
                         data<float>(parts),
                         parts.size(0),
                         data<float>(within),
                         within.has_value() ? within->size(0) : 0,
                         data<float>(log_sums),
                         data<float>(rows),
                         data<float>(losses)};
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_rows_forward_cuda(
        listed_pairs<T>(z, positives, specific, negatives, group, state, ranges, columns, scale), of_rows, on.stream);
  });
}

template <typename T>
StagedColumns<T> staged_columns(const std::optional<Tensor>& slot_ranges, int64_t first, int64_t last,
                                const std::optional<Tensor>& staged) {
  return {data<int64_t>(slot_ranges), first, last, staged.has_value() ? staged->size(1) : 0, data<T>(staged)};
}

// `out` is `sums` where there is no factor.
void contrastive_rows_backward(Tensor z, Tensor positives, std::optional<Tensor> specific,
                               std::optional<Tensor> negatives, int64_t group, Tensor state, Tensor ranges,
                               Tensor columns, Tensor slot_ranges, int64_t first_column, int64_t last_column,
                               double scale, Tensor numbers, Tensor sums, std::optional<Tensor> staged,
                               std::optional<Tensor> factor, Tensor out) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_rows_backward_cuda(
        listed_pairs<T>(z, positives, specific, negatives, group, state, ranges, columns, scale),
        staged_columns<T>(slot_ranges, first_column, last_column, staged), data<float>(numbers), data<float>(sums),
        data<float>(factor), factor.has_value() ? data<T>(out) : nullptr, static_cast<int>(out.size(1)), on.stream);
  });
}

// Where words would begin that have `count` more before them. No pointer is made outside of what it points to by adding.
const uint32_t* moved_back(const uint32_t* words, int64_t count) {
  if (words == nullptr) return nullptr;
  return reinterpret_cast<const uint32_t*>(reinterpret_cast<uintptr_t>(words) - count * sizeof(uint32_t));
}

template <typename T>
BlockPairs<T> block_pairs(const Tensor& z, const Tensor& positives, const std::optional<Tensor>& specific,
                          const std::optional<Tensor>& negatives, const Tensor& state, int64_t group, int64_t first,
                          bool within, bool has_lists, double scale) {
  const auto in_fours = [](const uint32_t* bits) { return reinterpret_cast<uintptr_t>(bits) % 16 == 0; };
  const int64_t before = first * positives.size(1);
  ContrastiveMasks masks{moved_back(data<uint32_t>(positives), before),
                         moved_back(data<uint32_t>(specific), before),
                         data<uint32_t>(negatives),
                         static_cast<int>(z.size(0)),
                         static_cast<int>(group),
                         positives.size(1) % 4 == 0,
                         static_cast<int>(first),
                         static_cast<int>(first + positives.size(0))};
  masks.aligned = masks.aligned && in_fours(masks.positives) && in_fours(masks.specific) && in_fours(masks.negatives);
  return {rows<T>(z), masks, within, has_lists, data<int64_t>(state), static_cast<float>(scale)};
}

void contrastive_blocks_forward(Tensor z, Tensor positives, std::optional<Tensor> specific,
                                std::optional<Tensor> negatives, Tensor state, int64_t group, int64_t first, bool within,
                                bool has_lists, double scale, Tensor square, Tensor parts) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_blocks_forward_cuda(
        block_pairs<T>(z, positives, specific, negatives, state, group, first, within, has_lists, scale),
        data<float>(square), data<float>(parts), on.stream);
  });
}

// sums (rows, dim): float32 within images, else of the type of z. Without masks by columns they are those by rows.
void contrastive_blocks_backward(Tensor z, Tensor positives, std::optional<Tensor> specific,
                                 std::optional<Tensor> negatives, Tensor state, int64_t group, int64_t first,
                                 bool within, bool has_lists, bool symmetric, std::optional<Tensor> positives_by_columns,
                                 std::optional<Tensor> specific_by_columns, double scale, Tensor numbers, Tensor shift,
                                 Tensor factor, Tensor sums) {
  const OnDeviceOf on(z);
  const bool by_columns = positives_by_columns.has_value();
  const int64_t before = first / 32, words = (by_columns ? *positives_by_columns : positives).size(1);
  const MasksByColumns masks{
      moved_back(data<uint32_t>(by_columns ? *positives_by_columns : positives), before),
      moved_back(data<uint32_t>(by_columns ? specific_by_columns : specific), before),
      static_cast<int>(words),
      static_cast<int>(before + words)};
  const BlockSums of_anchors{data<float>(numbers), data<float>(shift), data<float>(factor), sums.data_ptr(),
                             static_cast<int>(sums.size(1)), symmetric, masks};
  if (reinterpret_cast<uintptr_t>(of_anchors.numbers) % 16 != 0) {
    throw std::runtime_error("hpkernels: the numbers of anchors must start at a multiple of 16 bytes");
  }
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_blocks_backward_cuda(
        block_pairs<T>(z, positives, specific, negatives, state, group, first, within, has_lists, scale), of_anchors,
        on.stream);
  });
}

template <typename T>
SampledPairs<T> sampled_pairs(const Tensor& z, int64_t group, const Tensor& ranges, const Tensor& columns,
                              const Tensor& state, double scale) {
  return {rows<T>(z), group, data<int64_t>(state), data<int64_t>(ranges), data<int32_t>(columns),
          static_cast<float>(scale)};
}

void contrastive_sampled_forward(Tensor z, int64_t group, Tensor sampled_ranges, Tensor sampled_columns, Tensor state,
                                 double scale, Tensor log_sums) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_sampled_forward_cuda(sampled_pairs<T>(z, group, sampled_ranges, sampled_columns, state, scale),
                                     data<float>(log_sums), on.stream);
  });
}

int64_t contrastive_staged_rows(Tensor z, int64_t group) {
  const OnDeviceOf on(z);
  int64_t found = 0;
  with_type_of(z, [&](auto zero) { found = contrastive_staged_rows_cuda(rows<decltype(zero)>(z), group); });
  return found;
}

void contrastive_sampled_backward(Tensor z, int64_t group, Tensor sampled_ranges, Tensor sampled_columns, Tensor slots,
                                  Tensor state, int64_t first_column, int64_t last_column, double scale,
                                  Tensor numbers, Tensor sums, Tensor staged) {
  const OnDeviceOf on(z);
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    contrastive_sampled_backward_cuda(sampled_pairs<T>(z, group, sampled_ranges, sampled_columns, state, scale),
                                      data<float>(numbers), data<int32_t>(slots), data<float>(sums),
                                      staged_columns<T>(std::nullopt, first_column, last_column, staged), on.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(hpkernels_cuda, m) {
  m.def("hidden_positives(Tensor features, Tensor threshold, bool symmetric, Tensor(a!) bits) -> ()");
  m.def("hidden_positives_between(Tensor features, Tensor keys, Tensor threshold, Tensor key_threshold, bool either, "
        "int first, Tensor(a!) bits) -> ()");
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
  m.def("contrastive_draw_negatives(Tensor seed, int columns, int threshold, Tensor(a!) bits) -> ()");
  m.def("contrastive_list_sampled(Tensor negatives, int anchors, Tensor(a!) state, int stage_columns, "
        "int slot_capacity, Tensor(b!) transposed, Tensor(c!) slot_ranges, Tensor(d!) ranges, Tensor(e!) columns, "
        "Tensor(f!) slots) -> ()");
  m.def("contrastive_count_and_list(Tensor positives, Tensor? specific, Tensor? negatives, int anchors, int group, "
        "int first, Tensor(a!) state, Tensor(b!) counts, Tensor(c!)? ranges, Tensor(d!)? columns) -> ()");
  m.def("contrastive_weigh(Tensor counts, Tensor specific_weight, int group, bool joint, bool reweight, "
        "bool keep_specific_only, Tensor(a!) weights, Tensor(b!) state) -> ()");
  m.def("contrastive_greatest_square(Tensor z, Tensor(a!) greatest) -> ()");
  m.def("contrastive_scale_rows(Tensor rows, Tensor greatest, Tensor lowest, Tensor highest, Tensor grad_losses, "
        "float temperature, float greatest_g, float most_apart, Tensor(a!) numbers, Tensor(b!) shifts, "
        "Tensor(c!) factors) -> ()");
  m.def("contrastive_rows_parts(int anchors) -> int");
  m.def("contrastive_rows_forward(Tensor z, Tensor positives, Tensor? specific, Tensor? negatives, int group, "
        "Tensor weights, Tensor state, Tensor? ranges, Tensor? columns, float scale, float loss_scale, Tensor square, "
        "Tensor parts, Tensor? within, Tensor? log_sums, Tensor(a!) rows, Tensor(b!) losses) -> ()");
  m.def("contrastive_rows_backward(Tensor z, Tensor positives, Tensor? specific, Tensor? negatives, int group, "
        "Tensor state, Tensor ranges, Tensor columns, Tensor slot_ranges, int first_column, int last_column, "
        "float scale, Tensor numbers, Tensor(a!) sums, Tensor? staged, Tensor? factor, Tensor(b!) out) -> ()");
  m.def("contrastive_blocks_parts(int anchors, int group, bool within, int first, int rows) -> int");
  m.def("contrastive_blocks_forward(Tensor z, Tensor positives, Tensor? specific, Tensor? negatives, Tensor state, "
        "int group, int first, bool within, bool has_lists, float scale, Tensor square, Tensor(a!) parts) -> ()");
  m.def("contrastive_blocks_backward(Tensor z, Tensor positives, Tensor? specific, Tensor? negatives, Tensor state, "
        "int group, int first, bool within, bool has_lists, bool symmetric, Tensor? positives_by_columns, "
        "Tensor? specific_by_columns, float scale, Tensor numbers, Tensor shift, Tensor factor, Tensor(a!) sums) -> ()");
  m.def("contrastive_sampled_forward(Tensor z, int group, Tensor sampled_ranges, Tensor sampled_columns, Tensor state, "
        "float scale, Tensor(a!) log_sums) -> ()");
  m.def("contrastive_staged_rows(Tensor z, int group) -> int");
  m.def("contrastive_sampled_backward(Tensor z, int group, Tensor sampled_ranges, Tensor sampled_columns, "
        "Tensor slots, Tensor state, int first_column, int last_column, float scale, Tensor numbers, Tensor(a!) sums, "
        "Tensor(b!) staged) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hpkernels_cuda, HPK_DISPATCH_KEY, m) {
  m.impl("hidden_positives", TORCH_BOX(&hidden_positives));
  m.impl("hidden_positives_between", TORCH_BOX(&hidden_positives_between));
  m.impl("local_propagation_weights", TORCH_BOX(&local_propagation_weights));
  m.impl("masked_topk_top1", TORCH_BOX(&masked_topk_top1));
  m.impl("masked_topk", TORCH_BOX(&masked_topk));
  m.impl("masked_topk_query_backward", TORCH_BOX(&masked_topk_query_backward));
  m.impl("masked_topk_pool_backward", TORCH_BOX(&masked_topk_pool_backward));
  m.impl("local_propagation_apply", TORCH_BOX(&local_propagation_apply));
  m.impl("local_propagation_apply_backward", TORCH_BOX(&local_propagation_apply_backward));
  m.impl("contrastive_draw_negatives", TORCH_BOX(&contrastive_draw_negatives));
  m.impl("contrastive_list_sampled", TORCH_BOX(&contrastive_list_sampled));
  m.impl("contrastive_count_and_list", TORCH_BOX(&contrastive_count_and_list));
  m.impl("contrastive_weigh", TORCH_BOX(&contrastive_weigh));
  m.impl("contrastive_greatest_square", TORCH_BOX(&contrastive_greatest_square));
  m.impl("contrastive_scale_rows", TORCH_BOX(&contrastive_scale_rows));
  m.impl("contrastive_rows_forward", TORCH_BOX(&contrastive_rows_forward));
  m.impl("contrastive_rows_backward", TORCH_BOX(&contrastive_rows_backward));
  m.impl("contrastive_blocks_forward", TORCH_BOX(&contrastive_blocks_forward));
  m.impl("contrastive_blocks_backward", TORCH_BOX(&contrastive_blocks_backward));
  m.impl("contrastive_sampled_forward", TORCH_BOX(&contrastive_sampled_forward));
  m.impl("contrastive_staged_rows", TORCH_BOX(&contrastive_staged_rows));
  m.impl("contrastive_sampled_backward", TORCH_BOX(&contrastive_sampled_backward));
}

STABLE_TORCH_LIBRARY_IMPL(hpkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("masked_topk_parts", TORCH_BOX(&hpk::masked_topk_parts));
  m.impl("contrastive_blocks_parts", TORCH_BOX(&hpk::contrastive_blocks_parts));
  m.impl("contrastive_rows_parts", TORCH_BOX(&hpk::contrastive_rows_parts));
}
