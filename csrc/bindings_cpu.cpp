// Registers the CPU kernels with PyTorch through its stable ABI. Shapes, dtypes and contiguity are the callers' part
// (hpkernels/ops/<op>/cpu.py): nothing here is public.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "contrastive/contrastive.h"
#include "hidden_positives/hidden_positives.h"
#include "local_propagation/local_propagation.h"
#include "masked_topk/masked_topk.h"
#include "multi_positive_contrastive/multi_positive_contrastive.h"
#include "torch_products.h"

namespace {

using torch::stable::Tensor;

void run(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// Calls body(T{}) with T the floating-point type of `tensor`.
template <typename Body>
void with_type_of(const Tensor& tensor, Body body) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

template <typename T>
hpk::CoarseRows<T> coarse_rows_of(const Tensor& rows, const Tensor& stats) {
  const int64_t count = rows.size(0);
  T* of_stats = data<T>(stats);
  return {data<T>(rows), rows.size(1), of_stats, of_stats + count, of_stats + 2 * count};
}

// Calls body(Coarse{}, T{}) with the types of coarse products and of the rows.
template <typename Body>
void with_types_of(const Tensor& products, const Tensor& rows, Body body) {
  if (products.scalar_type() == torch::headeronly::ScalarType::Int) {
    body(int32_t{}, float{});
  } else {
    with_type_of(rows, [&](auto zero) { body(zero, zero); });
  }
}

bool has_int8_products() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

void coarse_int8(Tensor rows, Tensor codes, Tensor stats) {
  const int64_t count = rows.size(0);
  float* of_stats = data<float>(stats);
  hpk::coarse_int8_cpu(run, data<float>(rows), count, rows.size(1), data<int8_t>(codes), of_stats, of_stats + count,
                       of_stats + 2 * count);
}

void coarse_unrounded(Tensor rows, Tensor stats) {
  const int64_t count = rows.size(0);
  with_type_of(rows, [&](auto zero) {
    using T = decltype(zero);
    T* of_stats = data<T>(stats);
    hpk::coarse_unrounded_cpu<T>(run, data<T>(rows), count, rows.size(1), of_stats, of_stats + count,
                                 of_stats + 2 * count);
  });
}

int64_t masked_topk_select(Tensor products, int64_t first, Tensor query, Tensor query_stats, Tensor pool,
                           Tensor pool_stats, std::optional<Tensor> mask, std::optional<Tensor> query_group,
                           std::optional<Tensor> pool_group, Tensor values, Tensor indices) {
  int64_t computed = 0;
  with_types_of(products, query, [&](auto coarse, auto zero) {
    using Coarse = decltype(coarse);
    using T = decltype(zero);
    const int64_t references = pool.size(0), k = values.size(1);
    const auto from = [first](auto* of_queries, int64_t width) {
      return of_queries == nullptr ? nullptr : of_queries + first * width;
    };
    const hpk::Exclusions exclusions{from(data<bool>(mask), references), from(data<int64_t>(query_group), 1),
                                     data<int64_t>(pool_group)};
    computed = hpk::masked_topk_select_cpu<Coarse, T>(
        run, data<Coarse>(products), rows_from(coarse_rows_of<T>(query, query_stats), first), products.size(0),
        coarse_rows_of<T>(pool, pool_stats), references, exclusions, k, from(data<T>(values), k),
        from(data<int64_t>(indices), k));
  });
  return computed;
}

int64_t hidden_positives_pack(Tensor products, int64_t row, int64_t column, Tensor features, Tensor stats,
                              Tensor threshold, bool symmetric, Tensor bits) {
  int64_t open = 0;
  with_types_of(products, features, [&](auto coarse, auto zero) {
    using Coarse = decltype(coarse);
    using T = decltype(zero);
    const hpk::ProductTile<Coarse> tile{data<Coarse>(products), row, products.size(0), column, products.size(1)};
    open = hpk::hidden_positives_pack_cpu<Coarse, T>(run, tile, coarse_rows_of<T>(features, stats), data<T>(threshold),
                                                     symmetric, features.size(0), data<uint32_t>(bits));
  });
  return open;
}

int64_t hidden_positives_pack_between(Tensor products, int64_t row, int64_t column, Tensor features, Tensor stats,
                                      Tensor keys, Tensor key_stats, Tensor threshold, Tensor key_threshold, bool either,
                                      int64_t first, Tensor bits) {
  int64_t open = 0;
  with_types_of(products, features, [&](auto coarse, auto zero) {
    using Coarse = decltype(coarse);
    using T = decltype(zero);
    const hpk::ProductTile<Coarse> tile{data<Coarse>(products), row, products.size(0), column, products.size(1)};
    const hpk::Keys<T> of_keys{coarse_rows_of<T>(keys, key_stats), keys.size(0), data<T>(key_threshold), either, first};
    open = hpk::hidden_positives_pack_between_cpu<Coarse, T>(run, tile, coarse_rows_of<T>(features, stats),
                                                             data<T>(threshold), of_keys, data<uint32_t>(bits));
  });
  return open;
}

void transpose_bits(Tensor bits, int64_t columns, Tensor transposed) {
  hpk::transpose_bits_cpu(run, data<uint32_t>(bits), bits.size(0), columns, data<uint32_t>(transposed));
}

void draw_negatives(int64_t seed, int64_t columns, double rate, Tensor bits) {
  hpk::draw_negatives_cpu(run, static_cast<uint64_t>(seed), bits.size(0), columns, rate, data<uint32_t>(bits));
}

// The relations have the rows of anchors from `first` on.
hpk::Relations relations_of(int64_t anchors, int64_t first, const Tensor& agnostic,
                            const std::optional<Tensor>& agnostic_t, const std::optional<Tensor>& specific,
                            const std::optional<Tensor>& specific_t, const Tensor& negatives,
                            const std::optional<Tensor>& negatives_t) {
  return {anchors,
          negatives.size(0),
          first,
          agnostic.size(0),
          data<uint32_t>(agnostic),
          data<uint32_t>(agnostic_t),
          data<uint32_t>(specific),
          data<uint32_t>(specific_t),
          data<uint32_t>(negatives),
          data<uint32_t>(negatives_t)};
}

template <typename T>
hpk::AnchorSums<T> sums_of(const Tensor& sums, const Tensor& counts) {
  const int64_t anchors = sums.size(1);
  T* real = data<T>(sums);
  int64_t* whole = data<int64_t>(counts);
  return {real, real + anchors, real + 2 * anchors, whole, whole + anchors};
}

template <typename T>
hpk::AnchorCoefficients<T> coefficients_of(const Tensor& rows) {
  const int64_t anchors = rows.size(1);
  const T* real = data<T>(rows);
  return {real, real + anchors, real + 2 * anchors, real + 3 * anchors};
}

std::tuple<int64_t, int64_t> contrastive_count_pairs(int64_t anchors, int64_t first, Tensor agnostic,
                                                     std::optional<Tensor> specific, Tensor negatives) {
  const auto relations = relations_of(anchors, first, agnostic, {}, specific, {}, negatives, {});
  const hpk::PairCounts counts = hpk::count_pairs_cpu(run, relations);
  return {counts.all, counts.within_images};
}

template <typename T>
hpk::Matrix<T> matrix_of(const Tensor& tensor) {
  return {data<T>(tensor), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

void multiply(Tensor left, Tensor right, Tensor out, bool accumulate) {
  with_type_of(out, [&](auto zero) {
    using T = decltype(zero);
    hpk::multiply(run, matrix_of<T>(left), matrix_of<T>(right), matrix_of<T>(out), accumulate);
  });
}

void square_products(Tensor z, Tensor out) {
  with_type_of(out, [&](auto zero) {
    using T = decltype(zero);
    hpk::square_products(run, matrix_of<T>(z), matrix_of<T>(out));
  });
}

template <typename T>
hpk::Block<T> block_of(const Tensor& products, int64_t row, int64_t column) {
  return {data<T>(products), row, products.size(0), column, products.size(1)};
}

void contrastive_block_forward(Tensor products, int64_t row, int64_t column, double inverse_temperature,
                               int64_t anchors, int64_t first, Tensor agnostic, std::optional<Tensor> specific,
                               Tensor negatives, Tensor sums, Tensor counts) {
  const auto relations = relations_of(anchors, first, agnostic, {}, specific, {}, negatives, {});
  with_type_of(products, [&](auto zero) {
    using T = decltype(zero);
    hpk::contrastive_block_forward_cpu<T>(run, block_of<T>(products, row, column), static_cast<T>(inverse_temperature),
                                          relations, sums_of<T>(sums, counts));
  });
}

void contrastive_pairs_forward(Tensor z, bool across_images, double inverse_temperature, int64_t anchors,
                               int64_t first, Tensor agnostic, std::optional<Tensor> specific, Tensor negatives,
                               Tensor sums, Tensor counts) {
  const auto relations = relations_of(anchors, first, agnostic, {}, specific, {}, negatives, {});
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    const auto scale = static_cast<T>(inverse_temperature);
    const auto found = sums_of<T>(sums, counts);
    hpk::contrastive_sampled_forward_cpu<T>(run, data<T>(z), z.size(1), scale, relations, across_images, found);
    hpk::contrastive_rows_forward_cpu<T>(run, data<T>(z), z.size(1), scale, relations, across_images, found);
  });
}

void contrastive_block_backward(Tensor products, int64_t row, int64_t column, double inverse_temperature,
                                int64_t anchors, int64_t first, Tensor agnostic, Tensor agnostic_t,
                                std::optional<Tensor> specific, std::optional<Tensor> specific_t, Tensor negatives,
                                Tensor negatives_t, Tensor rows) {
  const auto relations =
      relations_of(anchors, first, agnostic, agnostic_t, specific, specific_t, negatives, negatives_t);
  with_type_of(products, [&](auto zero) {
    using T = decltype(zero);
    hpk::contrastive_block_backward_cpu<T>(run, block_of<T>(products, row, column),
                                           static_cast<T>(inverse_temperature), relations, coefficients_of<T>(rows));
  });
}

void contrastive_pairs_backward(Tensor z, bool across_images, double inverse_temperature, int64_t anchors,
                                int64_t first, Tensor agnostic, Tensor agnostic_t, std::optional<Tensor> specific,
                                std::optional<Tensor> specific_t, Tensor negatives, Tensor rows, Tensor grad_z) {
  const auto relations = relations_of(anchors, first, agnostic, agnostic_t, specific, specific_t, negatives, {});
  with_type_of(z, [&](auto zero) {
    using T = decltype(zero);
    const auto scale = static_cast<T>(inverse_temperature);
    const auto known = coefficients_of<T>(rows);
    hpk::contrastive_sampled_backward_cpu<T>(run, data<T>(z), z.size(1), scale, relations, across_images, known,
                                             data<T>(grad_z));
    hpk::contrastive_rows_backward_cpu<T>(run, data<T>(z), z.size(1), scale, relations, across_images, known,
                                               data<T>(grad_z));
  });
}

hpk::PairForms pair_forms_of(const std::optional<Tensor>& anchor_ids, const std::optional<Tensor>& key_ids,
                             const std::optional<Tensor>& bits, const std::optional<Tensor>& offsets,
                             const std::optional<Tensor>& indices) {
  return {data<int64_t>(anchor_ids), data<int64_t>(key_ids), key_ids.has_value() ? key_ids->size(0) : 0,
          data<uint32_t>(bits),      data<int64_t>(offsets), data<int64_t>(indices),
          indices.has_value() ? indices->size(0) : 0};
}

template <typename T>
hpk::LogitTile<T> logit_tile_of(const Tensor& logits, int64_t row, int64_t column) {
  return {data<T>(logits), row, logits.size(0), column, logits.size(1)};
}

template <typename T>
hpk::TilePairs<T> tile_pairs_of(const Tensor& positives, const Tensor& denominator,
                                const std::optional<Tensor>& weights) {
  return {data<uint32_t>(positives), data<uint32_t>(denominator), data<T>(weights)};
}

// What the ops that find pairs take of the relations: parameters, arguments and schema.
#define HPK_RELATIONS                                                                                                 \
  std::optional<Tensor> anchor_ids, std::optional<Tensor> key_ids, std::optional<Tensor> bits,                        \
      std::optional<Tensor> offsets, std::optional<Tensor> indices, std::optional<Tensor> listed_weights,             \
      std::optional<Tensor> excluded_anchor_ids, std::optional<Tensor> excluded_key_ids,                              \
      std::optional<Tensor> excluded_bits, std::optional<Tensor> excluded_offsets,                                    \
      std::optional<Tensor> excluded_indices, int64_t keys, int64_t own, bool triangle, bool decoupled,               \
      bool exclude_positives, double scale, std::optional<Tensor> bias
#define HPK_RELATIONS_OF(T)                                                                                           \
  hpk::PairRelations<T> {                                                                                             \
    pair_forms_of(anchor_ids, key_ids, bits, offsets, indices), data<T>(listed_weights),                              \
        pair_forms_of(excluded_anchor_ids, excluded_key_ids, excluded_bits, excluded_offsets, excluded_indices),      \
        {keys, own, triangle, decoupled, exclude_positives}, static_cast<T>(scale), data<T>(bias)                     \
  }
#define HPK_RELATIONS_SCHEMA                                                                                          \
  "Tensor? anchor_ids, Tensor? key_ids, Tensor? bits, Tensor? offsets, Tensor? indices, Tensor? listed_weights,"      \
  " Tensor? excluded_anchor_ids, Tensor? excluded_key_ids, Tensor? excluded_bits, Tensor? excluded_offsets,"          \
  " Tensor? excluded_indices, int keys, int own, bool triangle, bool decoupled, bool exclude_positives, float scale," \
  " Tensor? bias"

void contrastive_pairs(Tensor products, int64_t row, int64_t column, HPK_RELATIONS, Tensor positives,
                       Tensor denominator, std::optional<Tensor> weights) {
  with_type_of(products, [&](auto zero) {
    using T = decltype(zero);
    hpk::contrastive_pairs_cpu<T>(run, logit_tile_of<T>(products, row, column), HPK_RELATIONS_OF(T),
                                  tile_pairs_of<T>(positives, denominator, weights));
  });
}

void contrastive_whole_rows(Tensor products, int64_t row, HPK_RELATIONS, bool inside, Tensor coefficients, Tensor rows) {
  with_type_of(products, [&](auto zero) {
    using T = decltype(zero);
    hpk::contrastive_whole_rows_cpu<T>(run, logit_tile_of<T>(products, row, 0), HPK_RELATIONS_OF(T), inside,
                                       data<T>(coefficients), data<T>(rows));
  });
}

void contrastive_statistics(Tensor logits, Tensor positives, Tensor denominator, std::optional<Tensor> weights,
                            bool inside, Tensor rows, std::optional<Tensor> columns) {
  with_type_of(logits, [&](auto zero) {
    using T = decltype(zero);
    hpk::contrastive_statistics_cpu<T>(run, logit_tile_of<T>(logits, 0, 0),
                                       tile_pairs_of<T>(positives, denominator, weights), inside, data<T>(rows),
                                       data<T>(columns));
  });
}

void contrastive_gradient(Tensor logits, Tensor positives, Tensor denominator, std::optional<Tensor> weights,
                          bool inside, Tensor rows, std::optional<Tensor> columns) {
  with_type_of(logits, [&](auto zero) {
    using T = decltype(zero);
    hpk::contrastive_gradient_cpu<T>(run, logit_tile_of<T>(logits, 0, 0),
                                     tile_pairs_of<T>(positives, denominator, weights), inside, data<T>(rows),
                                     data<T>(columns));
  });
}

void local_propagation_weights(Tensor logits, double sigma, double low, double high, Tensor weights) {
  with_type_of(logits, [&](auto zero) {
    using T = decltype(zero);
    int64_t window = 1;
    while (window * window < weights.size(1)) ++window;
    hpk::local_propagation_weights_cpu<T>(run, data<T>(logits), weights.size(0), weights.size(2), weights.size(3),
                                          sigma, low, high, window, data<T>(weights));
  });
}

template <bool backward>
void local_propagation_stencil(Tensor input, Tensor weights, Tensor output) {
  with_type_of(input, [&](auto zero) {
    using T = decltype(zero);
    int64_t window = 1;
    while (window * window < weights.size(1)) ++window;
    const auto stencil = backward ? hpk::local_propagation_apply_backward_cpu<T> : hpk::local_propagation_apply_cpu<T>;
    stencil(run, data<T>(input), data<T>(weights), input.size(0), input.size(1), input.size(2), input.size(3), window,
            data<T>(output));
  });
}

void local_propagation_apply(Tensor code, Tensor weights, Tensor mixed) {
  local_propagation_stencil<false>(code, weights, mixed);
}

void local_propagation_apply_backward(Tensor grad_mixed, Tensor weights, Tensor grad_code) {
  local_propagation_stencil<true>(grad_mixed, weights, grad_code);
}

}  // namespace

STABLE_TORCH_LIBRARY(hpkernels_cpu, m) {
  m.def("has_int8_products() -> bool");
  m.def("coarse_int8(Tensor rows, Tensor(a!) codes, Tensor(b!) stats) -> ()");
  m.def("coarse_unrounded(Tensor rows, Tensor(a!) stats) -> ()");
  m.def("masked_topk_select(Tensor products, int first, Tensor query, Tensor query_stats, Tensor pool,"
        " Tensor pool_stats, Tensor? mask, Tensor? query_group, Tensor? pool_group, Tensor(a!) values,"
        " Tensor(b!) indices) -> int");
  m.def("hidden_positives_pack(Tensor products, int row, int column, Tensor features, Tensor stats, Tensor threshold,"
        " bool symmetric, Tensor(a!) bits) -> int");
  m.def("hidden_positives_pack_between(Tensor products, int row, int column, Tensor features, Tensor stats, Tensor keys,"
        " Tensor key_stats, Tensor threshold, Tensor key_threshold, bool either, int first, Tensor(a!) bits) -> int");
  m.def("transpose_bits(Tensor bits, int columns, Tensor(a!) transposed) -> ()");
  m.def("contrastive_count_pairs(int anchors, int first, Tensor agnostic, Tensor? specific, Tensor negatives)"
        " -> (int, int)");
  m.def("multiply(Tensor left, Tensor right, Tensor(a!) out, bool accumulate) -> ()");
  m.def("square_products(Tensor z, Tensor(a!) out) -> ()");
  m.def("contrastive_block_forward(Tensor(a!) products, int row, int column, float inverse_temperature, int anchors,"
        " int first, Tensor agnostic, Tensor? specific, Tensor negatives, Tensor(b!) sums, Tensor(c!) counts) -> ()");
  m.def("contrastive_pairs_forward(Tensor z, bool across_images, float inverse_temperature, int anchors, int first,"
        " Tensor agnostic, Tensor? specific, Tensor negatives, Tensor(a!) sums, Tensor(b!) counts) -> ()");
  m.def("contrastive_block_backward(Tensor(a!) products, int row, int column, float inverse_temperature, int anchors,"
        " int first, Tensor agnostic, Tensor agnostic_t, Tensor? specific, Tensor? specific_t, Tensor negatives,"
        " Tensor negatives_t, Tensor rows) -> ()");
  m.def("contrastive_pairs_backward(Tensor z, bool across_images, float inverse_temperature, int anchors, int first,"
        " Tensor agnostic, Tensor agnostic_t, Tensor? specific, Tensor? specific_t, Tensor negatives, Tensor rows,"
        " Tensor(a!) grad_z) -> ()");
  m.def("contrastive_pairs(Tensor(a!) products, int row, int column, " HPK_RELATIONS_SCHEMA
        ", Tensor(b!) positives, Tensor(c!) denominator, Tensor(d!)? weights) -> ()");
  m.def("contrastive_whole_rows(Tensor(a!) products, int row, " HPK_RELATIONS_SCHEMA
        ", bool inside, Tensor coefficients, Tensor(b!) rows) -> ()");
  m.def("contrastive_statistics(Tensor logits, Tensor positives, Tensor denominator, Tensor? weights, bool inside,"
        " Tensor(a!) rows, Tensor(b!)? columns) -> ()");
  m.def("contrastive_gradient(Tensor(a!) logits, Tensor positives, Tensor denominator, Tensor? weights, bool inside,"
        " Tensor rows, Tensor? columns) -> ()");
  m.def("draw_negatives(int seed, int columns, float rate, Tensor(a!) bits) -> ()");
  m.def("local_propagation_weights(Tensor logits, float sigma, float low, float high, Tensor(a!) weights) -> ()");
  m.def("local_propagation_apply(Tensor code, Tensor weights, Tensor(a!) mixed) -> ()");
  m.def("local_propagation_apply_backward(Tensor grad_mixed, Tensor weights, Tensor(a!) grad_code) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hpkernels_cpu, CPU, m) {
  m.impl("coarse_int8", TORCH_BOX(&coarse_int8));
  m.impl("coarse_unrounded", TORCH_BOX(&coarse_unrounded));
  m.impl("masked_topk_select", TORCH_BOX(&masked_topk_select));
  m.impl("hidden_positives_pack", TORCH_BOX(&hidden_positives_pack));
  m.impl("hidden_positives_pack_between", TORCH_BOX(&hidden_positives_pack_between));
  m.impl("transpose_bits", TORCH_BOX(&transpose_bits));
  m.impl("contrastive_count_pairs", TORCH_BOX(&contrastive_count_pairs));
  m.impl("contrastive_block_forward", TORCH_BOX(&contrastive_block_forward));
  m.impl("multiply", TORCH_BOX(&multiply));
  m.impl("square_products", TORCH_BOX(&square_products));
  m.impl("contrastive_pairs_forward", TORCH_BOX(&contrastive_pairs_forward));
  m.impl("contrastive_block_backward", TORCH_BOX(&contrastive_block_backward));
  m.impl("contrastive_pairs_backward", TORCH_BOX(&contrastive_pairs_backward));
  m.impl("contrastive_pairs", TORCH_BOX(&contrastive_pairs));
  m.impl("contrastive_whole_rows", TORCH_BOX(&contrastive_whole_rows));
  m.impl("contrastive_statistics", TORCH_BOX(&contrastive_statistics));
  m.impl("contrastive_gradient", TORCH_BOX(&contrastive_gradient));
  m.impl("draw_negatives", TORCH_BOX(&draw_negatives));
  m.impl("local_propagation_weights", TORCH_BOX(&local_propagation_weights));
  m.impl("local_propagation_apply", TORCH_BOX(&local_propagation_apply));
  m.impl("local_propagation_apply_backward", TORCH_BOX(&local_propagation_apply_backward));
}

STABLE_TORCH_LIBRARY_IMPL(hpkernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("has_int8_products", TORCH_BOX(&has_int8_products));
}
