// A few rows of activations times a matrix of 4- or 8-bit codes: what each step of decoding waits for.
//
//   y[t, m] = sum over n of x[t, n] w[m, n],   w[m, n] = s[m, g] (q[m, n] - z[m, g]),   g: the group of column n.
//
// The work is to read the codes once, so x is rounded to int8, 32 values to a scale d (as llama.cpp's Q8), products are
// sums of integers, and only their sums over 32 columns, a block, become floats:
//
//   y[t, m] = sum over g of s[m, g] (sum over the blocks b of g of d[t, b] (q . x8)[m, t, b] - z[m, g] X[t, g]),
//   X[t, g] = sum over b of d[t, b] (sum of x8[t, b]).
//
// Layout: 16 outputs, a tile, stand side by side, so that a vector register holds 4 neighbouring columns of each of its
// outputs, x8 is broadcast to all of them, and no sum goes across a register. See `native_packed.tiles`.
#include <torch/library.h>

#include "dense.h"
#include "lanes.h"
#include "step.h"

namespace {
constexpr int TILE = 16, BLOCK = 32, AHEAD = 6144;

struct Rows {  // x rounded: [rows, n] in int8, of each block its scale d, of each group X
  std::vector<int8_t> x8;
  std::vector<float> d, X;
};

template <typename T>
void round_row(const T* x, int64_t n, int64_t group, int8_t* x8, float* d, float* X) {
  for (int64_t b = 0; b < n / BLOCK; b++) {
    float values[BLOCK], largest = 0;
    for (int j = 0; j < BLOCK; j++) values[j] = (float)x[b * BLOCK + j];
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < BLOCK; j++) largest = std::max(largest, std::fabs(values[j]));
    const float inverse = largest > 0 ? 127 / largest : 0;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < BLOCK; j++) {
      const int32_t rounded = (int32_t)__builtin_rintf(values[j] * inverse);
      x8[b * BLOCK + j] = (int8_t)rounded;
      sum += rounded;
    }
    d[b] = largest / 127;
    X[b * BLOCK / group] += d[b] * sum;
  }
}

// y of R rows and one tile. BITS 8: a byte is a code, whose two nibbles are multiplied by the same x8.
template <int BITS, int R>
void tile_rows(const uint8_t* codes, const at::Half* s, const at::Half* z, int64_t n, int64_t group, const int8_t* x8,
               const float* d, const float* X, float* y, int64_t stride) {
  constexpr int VECTORS = BLOCK * BITS / 32;  // of a block and a tile: 4 bytes of each output
  const int64_t blocks = n / BLOCK, groups = n / group, together = group / BLOCK;
  for (int part = 0; part < TILE; part += WIDTH) {
    Lanes total[R];
    for (int t = 0; t < R; t++) total[t] = splat(0);
    for (int64_t g = 0; g < groups; g++) {
      Lanes sum[R];
      const Lanes zero = load_halves(z + g * TILE + part), scale = load_halves(s + g * TILE + part);
      for (int t = 0; t < R; t++) sum[t] = multiply_add(zero, splat(-X[t * groups + g]), splat(0));
      for (int64_t b = g * together; b < (g + 1) * together; b++) {
        Sums lows[R], highs[R];
        for (int t = 0; t < R; t++) lows[t] = highs[t] = no_sums();
        // Processors do not read ahead beyond a page of 4 KiB, and each tile is about one.
        for (int line = 0; line < VECTORS; line++) __builtin_prefetch(codes + (b * VECTORS + line) * 64 + AHEAD);
        for (int v = 0; v < VECTORS; v++) {
          const Bytes packed = load(codes + ((b * VECTORS + v) * TILE + part) * 4);
          const Bytes low_nibbles = low(packed), high_nibbles = high(packed);
          for (int t = 0; t < R; t++) {
            const int32_t* four = (const int32_t*)(x8 + t * n + b * BLOCK);
            if constexpr (BITS == 8) {
              lows[t] = add(lows[t], low_nibbles, four[v]);
              highs[t] = add(highs[t], high_nibbles, four[v]);
            } else {  // one sum is enough
              lows[t] = add(add(lows[t], low_nibbles, four[2 * v]), high_nibbles, four[2 * v + 1]);
            }
          }
        }
        for (int t = 0; t < R; t++) {
          Lanes dot = floats(lows[t]);
          if constexpr (BITS == 8) dot = multiply_add(floats(highs[t]), splat(16), dot);
          sum[t] = multiply_add(dot, splat(d[t * blocks + b]), sum[t]);
        }
      }
      for (int t = 0; t < R; t++) total[t] = multiply_add(scale, sum[t], total[t]);
    }
    for (int t = 0; t < R; t++) store(y + t * stride + part, total[t]);
  }
}

template <int BITS, int R = ROWS>
void some_rows(int64_t rows, const uint8_t* codes, const at::Half* s, const at::Half* z, int64_t n, int64_t group,
               const int8_t* x8, const float* d, const float* X, float* y, int64_t stride) {
  if (rows == R) return tile_rows<BITS, R>(codes, s, z, n, group, x8, d, X, y, stride);
  if constexpr (R > 1) some_rows<BITS, R - 1>(rows, codes, s, z, n, group, x8, d, X, y, stride);
}

// x [..., n], fp32, bf16 or fp16; codes uint8 [tiles, n / 32, 64 bits]; scales and zeros fp16 [tiles, groups, 16].
// To y [..., outputs] in the dtype of x.
at::Tensor packed_rows(const at::Tensor& given, const at::Tensor& codes, const at::Tensor& scales,
                       const at::Tensor& zeros, int64_t outputs) {
  const at::Tensor x = given.contiguous();
  const int64_t n = x.size(-1), rows = x.numel() / n, tiles = codes.size(0), groups = scales.size(1);
  const int64_t bytes = codes.size(2), group = n / groups, padded = tiles * TILE;
  TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous() && zeros.is_contiguous());
  TORCH_CHECK(codes.size(1) * BLOCK == n && (bytes == 256 || bytes == 512) && group % BLOCK == 0 && outputs <= padded);
  Rows in{std::vector<int8_t>(rows * n), std::vector<float>(rows * n / BLOCK), std::vector<float>(rows * groups)};
  LLMLAB_DISPATCH(x.scalar_type(), "packed_rows", [&] {
    for (int64_t t = 0; t < rows; t++)
      round_row(x.const_data_ptr<scalar_t>() + t * n, n, group, in.x8.data() + t * n,
                in.d.data() + t * n / BLOCK, in.X.data() + t * groups);
  });
  at::Tensor y = at::empty({rows, padded}, x.options().dtype(at::kFloat));
  float* out = y.data_ptr<float>();
  const uint8_t* q = codes.const_data_ptr<uint8_t>();
  const at::Half *s = scales.const_data_ptr<at::Half>(), *z = zeros.const_data_ptr<at::Half>();
  const int64_t chunks = (rows + ROWS - 1) / ROWS;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) {
      for (int64_t chunk = 0; chunk < chunks; chunk++) {  // of equal size: the tile's codes are in the nearest cache now
        const int64_t first = rows * chunk / chunks, last = rows * (chunk + 1) / chunks;
        (bytes == 256 ? some_rows<4> : some_rows<8>)(
            last - first, q + tile * (n / BLOCK) * bytes, s + tile * groups * TILE, z + tile * groups * TILE, n, group,
            in.x8.data() + first * n, in.d.data() + first * (n / BLOCK), in.X.data() + first * groups,
            out + first * padded + tile * TILE, padded);
      }
    }
  });
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  return (padded == outputs ? y : y.slice(1, 0, outputs)).to(x.scalar_type()).contiguous().view(shape);
}
}  // namespace

TORCH_LIBRARY(llmlab, library) {
  library.def("packed_rows(Tensor x, Tensor codes, Tensor scales, Tensor zeros, int outputs) -> Tensor");
  library.def("dense_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("gated(Tensor a, Tensor b) -> Tensor");
  library.def("rotate(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)");
  library.def("attend_few(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor? mask, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(llmlab, CPU, library) {
  library.impl("packed_rows", &packed_rows);
  library.impl("dense_rows", &dense_rows);
  library.impl("rms_norm", &rms_norm);
  library.impl("gated", &gated);
  library.impl("rotate", &rotate);
  library.impl("attend_few", &attend_few);
}
