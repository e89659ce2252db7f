// A few rows of activations times a plain matrix, whose weights are read once:
//
//   y[t, m] = sum over n of x[t, n] w[m, n] + b[m].
//
// BLAS libraries are made for many rows or for one; with five rows they take up to twice as long as with one, though both
// wait for the same weights. Here OUTPUTS rows of W go through the registers side by side, and each number of theirs is
// multiplied by those of all rows of x. Sums are fp32.
#pragma once
#include "lanes.h"
#include "step.h"

namespace {
// y [R, M] of R rows of x and M rows of W.
template <int M, int R, typename T>
void dense_block(const T* w, int64_t n, const float* x, const float* bias, float* y, int64_t stride) {
  Lanes sums[R][M];
  for (int t = 0; t < R; t++)
    for (int m = 0; m < M; m++) sums[t][m] = splat(0);
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    Lanes weights[M];
    for (int m = 0; m < M; m++) {
      __builtin_prefetch(w + (M + m) * n + i, 0, 2);  // the next block: rows are too short for processors to read ahead
      weights[m] = load_any(w + m * n + i);
    }
    for (int t = 0; t < R; t++) {
      const Lanes inputs = load_floats(x + t * n + i);
      for (int m = 0; m < M; m++) sums[t][m] = multiply_add(inputs, weights[m], sums[t][m]);
    }
  }
  for (int t = 0; t < R; t++)
    for (int m = 0; m < M; m++) y[t * stride + m] = sum(sums[t][m]) + (bias ? bias[m] : 0);
  for (int t = 0; t < R && i < n; t++)
    for (int m = 0; m < M; m++)
      for (int64_t j = i; j < n; j++) y[t * stride + m] += x[t * n + j] * (float)w[m * n + j];
}

template <int M, typename T, int R = PLAIN_ROWS>
void dense_some(int64_t rows, const T* w, int64_t n, const float* x, const float* bias, float* y, int64_t stride) {
  if (rows == R) return dense_block<M, R>(w, n, x, bias, y, stride);
  if constexpr (R > 1) dense_some<M, T, R - 1>(rows, w, n, x, bias, y, stride);
}

// x [..., n] times W [outputs, n], both fp32, bf16 or fp16: [..., outputs].
at::Tensor dense_rows(const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t n = weight.size(1), outputs = weight.size(0), rows = given.numel() / n;
  TORCH_CHECK(weight.is_contiguous() && given.size(-1) == n && given.dtype() == weight.dtype());
  const at::Tensor x = given.to(at::kFloat).contiguous();
  const at::Tensor b = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor y = at::empty({rows, outputs}, x.options());
  const float *in = x.const_data_ptr<float>(), *shift = bias ? b.const_data_ptr<float>() : nullptr;
  float* out = y.data_ptr<float>();
  const int64_t chunks = (rows + PLAIN_ROWS - 1) / PLAIN_ROWS, blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
  LLMLAB_DISPATCH(weight.scalar_type(), "dense_rows", [&] {
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t from = block * OUTPUTS, to = std::min(from + OUTPUTS, outputs);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {  // of equal size: the block's weights are in a cache now
          const int64_t first = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - first;
          const bool whole = to - from == OUTPUTS;
          for (int64_t m = from; m < to; m += whole ? OUTPUTS : 1)
            (whole ? dense_some<OUTPUTS, scalar_t> : dense_some<1, scalar_t>)(
                count, w + m * n, n, in + first * n, shift ? shift + m : nullptr, out + first * outputs + m, outputs);
        }
      }
    });
  });
  std::vector<int64_t> shape = given.sizes().vec();
  shape.back() = outputs;
  return y.to(given.scalar_type()).reshape(shape);
}
}  // namespace
