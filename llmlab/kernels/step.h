// What stands between the matrices of a decode step: each of these is five to fifteen of torch's operations, whose
// launches take longer than their work on one token. The compiler makes vectors of the loops.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"

#define LLMLAB_DISPATCH(TYPE, NAME, ...)                                                                  \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)                                \
                                     AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES(__VA_ARGS__))

namespace {
constexpr int64_t GRAIN = 1 << 16;  // numbers of a thread's part: below it, threads cost more than they bring

// e^x = 2^n e^r, |r| <= ln 2 / 2; Taylor's series to r^6 is off by 3e-8 there.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.f), 88.f);
  const float n = (float)(int32_t)(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f));
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  const float e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
  return e * std::bit_cast<float>(((int32_t)n + 127) << 23);
}

template <typename A, typename B> float dot(const A* a, const B* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += (float)a[i] * (float)b[i];
  return sum;
}

// y = x / sqrt(|x|^2 / n + eps) * w, rounded to the dtype of x before the product as models do. x [..., n].
at::Tensor rms_norm(const at::Tensor& given, const at::Tensor& weight, double eps) {
  const at::Tensor x = given.contiguous(), w = weight.to(x.scalar_type()).contiguous();
  at::Tensor y = at::empty_like(x);
  const int64_t n = x.size(-1), rows = x.numel() / n;
  LLMLAB_DISPATCH(x.scalar_type(), "rms_norm", [&] {
    const scalar_t *in = x.const_data_ptr<scalar_t>(), *scale = w.const_data_ptr<scalar_t>();
    scalar_t* out = y.data_ptr<scalar_t>();
    for (int64_t row = 0; row < rows; row++, in += n, out += n) {
      const float inverse = 1 / std::sqrt(dot(in, in, n) / n + (float)eps);
      _Pragma("omp simd")
      for (int64_t i = 0; i < n; i++) out[i] = (scalar_t)((float)(scalar_t)((float)in[i] * inverse) * (float)scale[i]);
    }
  });
  return y;
}

// silu(a) b = a / (1 + e^-a) b, rounded to the dtype of a before the product as models do. a and b [..., n] may be parts
// of the rows of one product.
at::Tensor gated(const at::Tensor& given, const at::Tensor& other) {
  const int64_t n = given.size(-1);
  const at::Tensor a = given.reshape({-1, n}), b = other.reshape({-1, n});
  TORCH_CHECK(a.stride(1) == 1 && b.stride(1) == 1 && a.sizes() == b.sizes() && a.dtype() == b.dtype());
  at::Tensor y = at::empty(given.sizes(), given.options());
  LLMLAB_DISPATCH(a.scalar_type(), "gated", [&] {
    at::parallel_for(0, a.size(0), std::max<int64_t>(1, GRAIN / n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const scalar_t* gate = a.const_data_ptr<scalar_t>() + row * a.stride(0);
        const scalar_t* up = b.const_data_ptr<scalar_t>() + row * b.stride(0);
        scalar_t* out = y.data_ptr<scalar_t>() + row * n;
        _Pragma("omp simd")
        for (int64_t i = 0; i < n; i++) {
          const float value = (float)gate[i];
          out[i] = (scalar_t)((float)(scalar_t)(value / (1 + exponential(-value))) * (float)up[i]);
        }
      }
    });
  });
  return y;
}

// Rotary positions: y = x cos + [-x2, x1] sin, x1 the first half of each head of x [b, heads, width, d]; cos and sin
// [b or 1, width, d] (Su et al. 2021, arXiv 2104.09864, equation 34, with halves in the place of pairs).
at::Tensor rotated(const at::Tensor& x, const at::Tensor& cosine, const at::Tensor& sine) {
  const int64_t d = x.size(3), half = d / 2, heads = x.size(1), width = x.size(2);
  const at::Tensor cos = cosine.expand({x.size(0), width, d}), sin = sine.expand_as(cos);
  TORCH_CHECK(x.stride(3) == 1 && cos.stride(2) == 1 && sin.strides() == cos.strides() && x.dtype() == cos.dtype() && d % 2 == 0);
  at::Tensor y = at::empty(x.sizes(), x.options());
  LLMLAB_DISPATCH(x.scalar_type(), "rotate", [&] {
    at::parallel_for(0, x.size(0) * heads * width, std::max<int64_t>(1, GRAIN / d), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const int64_t t = row % width, head = row / width % heads, b = row / width / heads;
        const scalar_t* in = x.const_data_ptr<scalar_t>() + b * x.stride(0) + head * x.stride(1) + t * x.stride(2);
        const scalar_t* c = cos.const_data_ptr<scalar_t>() + b * cos.stride(0) + t * cos.stride(1);
        const scalar_t* s = sin.const_data_ptr<scalar_t>() + b * cos.stride(0) + t * cos.stride(1);
        scalar_t* out = y.data_ptr<scalar_t>() + row * d;
        _Pragma("omp simd")
        for (int64_t i = 0; i < half; i++) {
          const float first = (float)in[i], second = (float)in[half + i];
          out[i] = (scalar_t)(first * (float)c[i] - second * (float)s[i]);
          out[half + i] = (scalar_t)(second * (float)c[half + i] + first * (float)s[half + i]);
        }
      }
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> rotate(const at::Tensor& query, const at::Tensor& key, const at::Tensor& cos, const at::Tensor& sin) {
  return {rotated(query, cos, sin), rotated(key, cos, sin)};
}

// H heads of one token that share keys and values: y = softmax(q k^T scale) v. q [H, d], y [H, dv], scores [H, seen].
template <int H, typename T>
void attend_heads(const float* q, const T* k, const T* v, int64_t key_stride, int64_t value_stride, int64_t seen,
                  int64_t d, int64_t dv, float scale, float* scores, float* y) {
  float largest[H];
  std::fill_n(largest, H, -INFINITY);
  for (int64_t t = 0; t < seen; t++, k += key_stride) {
    Lanes sums[H];
    for (int h = 0; h < H; h++) sums[h] = splat(0);
    int64_t i = 0;
    for (; i + WIDTH <= d; i += WIDTH) {
      const Lanes keys = load_any(k + i);
      for (int h = 0; h < H; h++) sums[h] = multiply_add(load_floats(q + h * d + i), keys, sums[h]);
    }
    for (int h = 0; h < H; h++) {
      float score = sum(sums[h]);
      for (int64_t j = i; j < d; j++) score += q[h * d + j] * (float)k[j];
      scores[h * seen + t] = score *= scale;
      largest[h] = std::max(largest[h], score);
    }
  }
  float total[H];
  for (int h = 0; h < H; h++) {
    float* weights = scores + h * seen;
    float all = 0;
#pragma omp simd reduction(+ : all)
    for (int64_t t = 0; t < seen; t++) all += weights[t] = exponential(weights[t] - largest[h]);
    total[h] = all;
  }
  int64_t i = 0;
  for (; i + WIDTH <= dv; i += WIDTH) {
    Lanes sums[H];
    for (int h = 0; h < H; h++) sums[h] = splat(0);
    for (int64_t t = 0; t < seen; t++) {
      const Lanes values = load_any(v + t * value_stride + i);
      for (int h = 0; h < H; h++) sums[h] = multiply_add(splat(scores[h * seen + t]), values, sums[h]);
    }
    for (int h = 0; h < H; h++) store(y + h * dv + i, multiply_add(sums[h], splat(1 / total[h]), splat(0)));
  }
  for (; i < dv; i++)
    for (int h = 0; h < H; h++) {
      float value = 0;
      for (int64_t t = 0; t < seen; t++) value += scores[h * seen + t] * (float)v[t * value_stride + i];
      y[h * dv + i] = value / total[h];
    }
}

// One token of one row: write its key and value into the cache at `start`, then attend to all that the cache holds.
// query [1, heads, 1, d], key and value [1, kv_heads, 1, d], keys and values [1, kv_heads, capacity, d], start []:
// [1, 1, heads, d] in the dtype of query.
at::Tensor attend_token(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor keys,
                        at::Tensor values, const at::Tensor& start, double scale) {
  const int64_t heads = query.size(1), groups = heads / key.size(1), d = query.size(3), dv = value.size(3);
  const int64_t position = *start.const_data_ptr<int64_t>(), seen = position + 1;
  TORCH_CHECK(query.size(0) == 1 && query.size(2) == 1 && seen <= keys.size(2) && position >= 0);
  TORCH_CHECK(keys.stride(3) == 1 && values.stride(3) == 1 && keys.dtype() == values.dtype());
  keys.select(2, position).copy_(key.select(2, 0));
  values.select(2, position).copy_(value.select(2, 0));
  const at::Tensor q = query.to(at::kFloat).contiguous();
  at::Tensor y = at::empty({1, 1, heads, dv}, q.options());
  LLMLAB_DISPATCH(keys.scalar_type(), "attend_token", [&] {
    at::parallel_for(0, heads, std::max<int64_t>(1, 8 * GRAIN / (seen * d)), [&](int64_t begin, int64_t end) {
      std::vector<float> scores(4 * seen);
      for (int64_t head = begin, count; head < end; head += count) {
        const int64_t shared = std::min(end - head, groups - head % groups);  // heads that read the same keys
        count = std::min<int64_t>(shared, 4);
        const auto attend = count == 4   ? attend_heads<4, scalar_t>
                            : count == 3 ? attend_heads<3, scalar_t>
                            : count == 2 ? attend_heads<2, scalar_t>
                                         : attend_heads<1, scalar_t>;
        const int64_t kv_head = head / groups;
        attend(q.const_data_ptr<float>() + head * d, keys.const_data_ptr<scalar_t>() + kv_head * keys.stride(1),
               values.const_data_ptr<scalar_t>() + kv_head * values.stride(1), keys.stride(2), values.stride(2), seen,
               d, dv, (float)scale, scores.data(), y.data_ptr<float>() + head * dv);
      }
    });
  });
  return y.to(query.scalar_type());
}
}  // namespace
