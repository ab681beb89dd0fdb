// Exponentials and logs of their sums: for CPU loops that are to be vectorised, without table and branch, and for GPUs.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "common/portable.h"

namespace hpk {

// exp(x) for x <= 0, relative error below 2 ulp; 0 below -87.3, where the exact value is no normal number.
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, the minimax polynomial of Cephes in r.
HPK_HOST_DEVICE float exp_nonpositive(float x) {
  const float clamped = x < -87.33654f ? -87.33654f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const float shifted = clamped * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  uint32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent + 127u) << 23;
  float scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return x < -87.33654f ? 0.0f : p * scale;
}

HPK_HOST_DEVICE double exp_nonpositive(double x) { return std::exp(x); }

// log(exp(a) + exp(b)).
template <typename T>
T log_add_exp(T a, T b) {
  const T greater = a > b ? a : b, smaller = a > b ? b : a;
  if (smaller == -std::numeric_limits<T>::infinity()) return greater;
  return greater + std::log1p(std::exp(smaller - greater));
}

// The log of an empty sum.
constexpr float kLogOfNothing = -std::numeric_limits<float>::infinity();

// exp(x), whose relative error grows with |x|: 2e-7 at 1, 2e-6 at 30.
HPK_HOST_DEVICE float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}

// The greatest logit, and the sum of exp(logit - greatest): rows of z may have any length. A logit of NaN stays.
struct LogSum {
  float greatest = kLogOfNothing, total = 0;

  HPK_HOST_DEVICE void add(float logit) { add({logit, 1}); }

  HPK_HOST_DEVICE void add(const LogSum& other) {
    const float raised = fmaxf(greatest, other.greatest);
    const float base = raised == kLogOfNothing ? 0 : raised;
    total = total * expf(greatest - base) + other.total * expf(other.greatest - base);
    greatest = raised;
  }

  HPK_HOST_DEVICE float value() const { return greatest + logf(total); }
};

}  // namespace hpk
