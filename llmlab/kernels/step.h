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

// To another dtype, to the nearest and ties to even: torch's own conversion to bf16 keeps compilers from making vectors.
template <typename T> inline T rounded(float x) { return (T)x; }
template <> inline at::BFloat16 rounded<at::BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return at::BFloat16((uint16_t)(x == x ? nearest : 0x7fc0), at::BFloat16::from_bits());
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
      float squares = 0;
      _Pragma("omp simd reduction(+ : squares)")
      for (int64_t i = 0; i < n; i++) squares += (float)in[i] * (float)in[i];
      const float inverse = 1 / std::sqrt(squares / n + (float)eps);
      _Pragma("omp simd")
      for (int64_t i = 0; i < n; i++) out[i] = rounded<scalar_t>((float)rounded<scalar_t>((float)in[i] * inverse) * (float)scale[i]);
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
          out[i] = rounded<scalar_t>((float)rounded<scalar_t>(value / (1 + exponential(-value))) * (float)up[i]);
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
          out[i] = rounded<scalar_t>(first * (float)c[i] - second * (float)s[i]);
          out[half + i] = rounded<scalar_t>(second * (float)c[half + i] + first * (float)s[half + i]);
        }
      }
    });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> rotate(const at::Tensor& query, const at::Tensor& key, const at::Tensor& cos, const at::Tensor& sin) {
  return {rotated(query, cos, sin), rotated(key, cos, sin)};
}

// H rows of queries that share keys and values: y = softmax(q k^T scale) v over the slots that each may see. q [H, d],
// y [H, dv], scores [H, seen]; mask [H, seen], or nothing if all are seen.
template <int H, typename T>
void attend_rows(const float* q, const T* k, const T* v, int64_t key_stride, int64_t value_stride, const bool* mask,
                 int64_t seen, int64_t d, int64_t dv, float scale, float* scores, float* y) {
  float largest[H], total[H];
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
      scores[h * seen + t] = score = mask && !mask[h * seen + t] ? -INFINITY : score * scale;
      largest[h] = std::max(largest[h], score);
    }
  }
  for (int h = 0; h < H; h++) {
    float *weights = scores + h * seen, all = 0;
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

// Put what comes in, [b, heads, width, d], into slots [b, width] of a cache [b, heads, capacity, d].
void write_slots(const at::Tensor& given, const at::Tensor& cache, const int64_t* slots) {
  const at::Tensor from = given.to(cache.scalar_type());
  TORCH_CHECK(from.stride(3) == 1 && cache.stride(3) == 1);
  const int64_t heads = from.size(1), width = from.size(2), d = from.size(3);
  LLMLAB_DISPATCH(cache.scalar_type(), "write_slots", [&] {
    for (int64_t b = 0; b < from.size(0); b++)
      for (int64_t t = 0; t < width; t++) {
        const int64_t slot = slots[b * width + t];
        TORCH_CHECK(slot >= 0 && slot < cache.size(2));
        for (int64_t head = 0; head < heads; head++)
          std::copy_n(from.const_data_ptr<scalar_t>() + b * from.stride(0) + head * from.stride(1) + t * from.stride(2), d,
                      cache.data_ptr<scalar_t>() + b * cache.stride(0) + head * cache.stride(1) + slot * cache.stride(2));
      }
  });
}

// Write the keys and values of a few tokens into their slots, then attend to the slots that each may see. query
// [b, heads, width, d], key and value [b, kv_heads, width, d], keys and values [b, kv_heads, capacity, d], slots [b, width];
// mask [b, 1, heads / kv_heads x width, seen], by default every slot up to the one token's own: [b, width, heads, dv].
at::Tensor attend_few(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor keys,
                      at::Tensor values, const at::Tensor& slots, const std::optional<at::Tensor>& mask, double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), width = query.size(2), d = query.size(3);
  const int64_t kv_heads = key.size(1), dv = value.size(3), rows = heads / kv_heads * width;
  const at::Tensor at = slots.contiguous(), sees = mask ? mask->contiguous() : at::Tensor();
  const int64_t* slot = at.const_data_ptr<int64_t>();
  const int64_t seen = mask ? sees.size(3) : *slot + 1;
  TORCH_CHECK(at.numel() == batch * width && keys.dtype() == values.dtype() && (mask || batch * width == 1));
  TORCH_CHECK(seen <= keys.size(2) && (!mask || (sees.size(0) == batch && sees.size(2) == rows)));
  write_slots(key, keys, slot);
  write_slots(value, values, slot);
  const at::Tensor q = query.to(at::kFloat).contiguous();  // rows of a KV head: its query heads, of each all tokens
  at::Tensor y = at::empty({batch, kv_heads, rows, dv}, q.options());
  const bool* seen_by = mask ? sees.const_data_ptr<bool>() : nullptr;
  constexpr int64_t SHARE = 4;
  const int64_t parts = (rows + SHARE - 1) / SHARE, work = SHARE * seen * d;
  LLMLAB_DISPATCH(keys.scalar_type(), "attend_few", [&] {
    at::parallel_for(0, batch * kv_heads * parts, std::max<int64_t>(1, 8 * GRAIN / work), [&](int64_t begin, int64_t end) {
      std::vector<float> scores(SHARE * seen);
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t row = unit % parts * SHARE, head = unit / parts % kv_heads, b = unit / parts / kv_heads;
        const int64_t count = std::min(rows - row, SHARE), place = (b * kv_heads + head) * rows + row;
        const auto attend = count == 4   ? attend_rows<4, scalar_t>
                            : count == 3 ? attend_rows<3, scalar_t>
                            : count == 2 ? attend_rows<2, scalar_t>
                                         : attend_rows<1, scalar_t>;
        attend(q.const_data_ptr<float>() + place * d,
               keys.const_data_ptr<scalar_t>() + b * keys.stride(0) + head * keys.stride(1),
               values.const_data_ptr<scalar_t>() + b * values.stride(0) + head * values.stride(1), keys.stride(2),
               values.stride(2), seen_by ? seen_by + (b * rows + row) * seen : nullptr, seen, d, dv, (float)scale,
               scores.data(), y.data_ptr<float>() + place * dv);
      }
    });
  });
  return y.view({batch, heads, width, dv}).transpose(1, 2).to(query.scalar_type());
}
}  // namespace
