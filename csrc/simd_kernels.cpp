// Compiled once per instruction set, with DPPO_FAST_SIMD naming it; see CMakeLists.txt. It must not instantiate inline
// functions of other headers: the linker keeps one copy of each, and that could be one for another processor.
#include <cstdint>

#include "simd.h"

#define DPPO_FAST_TEXT_(name) #name
#define DPPO_FAST_TEXT(name) DPPO_FAST_TEXT_(name)
#define DPPO_FAST_JOIN_(a, b) a##b
#define DPPO_FAST_JOIN(a, b) DPPO_FAST_JOIN_(a, b)

namespace dppo_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// A tile of kRows x kVectors sums fills the registers: 32 of them with AVX-512 and on ARM64, else 16.
constexpr int kRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

constexpr int kBytes = kLanes * sizeof(float);
typedef float Vector __attribute__((vector_size(kBytes), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(kBytes)));

Vector& at(float* p) { return *reinterpret_cast<Vector*>(p); }
const Vector& at(const float* p) { return *reinterpret_cast<const Vector*>(p); }

// kTileVectors vectors of outputs for kTileRows rows; a single row's from its inputs `used` [inputs] only.
template <int kTileRows, int kTileVectors>
void tile(std::size_t inputs, const std::uint32_t* used, const float* weights, Rows<const float> in, const float* bias,
          Rows<const float> add, Rows<float> out) {
  Vector sum[kTileRows][kTileVectors] = {};
  for (std::size_t i = 0; i < inputs; ++i) {
    const std::size_t k = kTileRows == 1 ? used[i] : i;
    const float* const w = weights + k * kTileVectors * kLanes;
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const float x = in.data[r * in.stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] += at(w + v * kLanes) * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      Vector y = sum[r][v] + at(bias + v * kLanes);
      if (add.data != nullptr) y += at(add.data + r * add.stride + v * kLanes);
      at(out.data + r * out.stride + v * kLanes) = y;
    }
  }
}

using Tile = decltype(&tile<1, 1>);

template <int kTileRows>
Tile tile_of(int vectors) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return tile<kTileRows, 4>;
    if (vectors == 3) return tile<kTileRows, 3>;
  }
  return vectors == 2 ? tile<kTileRows, 2> : tile<kTileRows, 1>;
}

Tile tile_of(int rows, int vectors) {
  switch (rows) {
    case 1: return tile_of<1>(vectors);
    case 2: return tile_of<2>(vectors);
    case 3: return tile_of<3>(vectors);
    case 4: return tile_of<4>(vectors);
    case 5: return tile_of<5>(vectors);
    default: return tile_of<6>(vectors);
  }
}

template <typename Float>
Rows<Float> offset(Rows<Float> rows, std::size_t row, std::size_t column) {
  return {rows.data == nullptr ? nullptr : rows.data + row * rows.stride + column, rows.stride};
}

void linear(const PackedLinear& layer, std::size_t rows, Rows<const float> in, Rows<const float> add, Rows<float> out,
            std::uint32_t* used) {
  constexpr std::size_t kPanel = kVectors * kLanes;
  std::size_t inputs = layer.inputs;
  if (rows == 1) {
    inputs = 0;
    for (std::size_t k = 0; k < layer.inputs; ++k) {
      used[inputs] = static_cast<std::uint32_t>(k);
      inputs += in.data[k] != 0.0f || !layer.finite;
    }
  }
  const std::size_t tiles = (rows + kRows - 1) / kRows;
  for (std::size_t column = 0; column < layer.outputs; column += kPanel) {
    const std::size_t left = layer.outputs - column;
    const int vectors = static_cast<int>((left < kPanel ? left : kPanel) / kLanes);
    for (std::size_t i = 0; i < tiles; ++i) {
      const std::size_t row = i * rows / tiles, end = (i + 1) * rows / tiles;
      tile_of(static_cast<int>(end - row), vectors)(inputs, used, layer.weights + column * layer.inputs,
                                                    offset(in, row, 0), layer.bias + column, offset(add, row, column),
                                                    offset(out, row, column));
    }
  }
}

Vector at_most(Vector x, float bound) { return x > bound ? Vector{} + bound : x; }   // NaN stays NaN
Vector at_least(Vector x, float bound) { return x < bound ? Vector{} + bound : x; }  // NaN stays NaN
Vector magnitude(Vector x) { return x < 0.0f ? -x : x; }

// e^x = scale (1 + rest), scale a power of two and rest in [-0.3, 0.42]; 0 below -87.7 and e^88 above 88.
struct Exponential {
  Vector scale;
  Vector rest;

  explicit Exponential(Vector x) {
    x = at_least(at_most(x, 88.0f), -88.0f);
    const float rounder = 0x1.8p23f;  // x / log 2 + rounder is rounded to an integer, which its low bits hold
    const Vector shifted = x * 1.44269504f + rounder;
    const Vector n = shifted - rounder;
    const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log 2 in two parts; the first product is exact
    Vector series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 1.0f / 2;
    rest = series * (r * r) + r;
    scale = (Vector)(((Bits)shifted + 127u) << 23);  // 0 for n = -127
  }

  Vector value() const { return scale * rest + scale; }
  Vector minus_one() const { return scale * rest + (scale - 1.0f); }
};

Vector relu(Vector x) { return at_least(x, 0.0f); }

Vector elu(Vector x) { return x > 0.0f ? x : Exponential(x).minus_one(); }

Vector tanh(Vector x) {
  const Vector e = Exponential(x + x).minus_one();
  return e / (e + 2.0f);
}

// x tanh(softplus(x)), where tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2); beyond 20 the quotient is 1.
Vector mish(Vector x) {
  const Vector e = Exponential(at_most(x, 20.0f)).value();
  const Vector n = e * (e + 2.0f);
  return x * (n / (n + 2.0f));
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), and log(1 + e) = 2 artanh(e / (e + 2)).
Vector softplus(Vector x) {
  const Vector e = Exponential(-magnitude(x)).value();
  const Vector u = e / (e + 2.0f);
  const Vector square = u * u;
  Vector series = square * (2.0f / 13) + 2.0f / 11;
  series = series * square + 2.0f / 9;
  series = series * square + 2.0f / 7;
  series = series * square + 2.0f / 5;
  series = series * square + 2.0f / 3;
  series = series * square + 2.0f;
  return series * u + relu(x);
}

// x Phi(x), by erfc(z) = (a1 t + ... + a5 t^5) e^(-z^2) with z = |x| / sqrt 2: Abramowitz & Stegun 1964, 7.1.26.
Vector gelu(Vector x) {
  const Vector t = 1.0f / (magnitude(x) * (0.3275911f * 0.707106781f) + 1.0f);
  Vector series = t * 1.061405429f - 1.453152027f;
  series = series * t + 1.421413741f;
  series = series * t - 0.284496736f;
  series = series * t + 0.254829592f;
  const Vector tail = x * (0.5f * t * series * Exponential(x * x * -0.5f).value());
  return x > 0.0f ? x - tail : tail;
}

template <Vector (*kFunction)(Vector)>
void map(std::size_t count, const float* in, float* out) {
  for (std::size_t i = 0; i < count; i += kLanes) at(out + i) = kFunction(at(in + i));
}

Vector identity(Vector x) { return x; }

void activate(Activation activation, std::size_t count, const float* in, float* out) {
  switch (activation) {
    case Activation::kIdentity: return map<identity>(count, in, out);
    case Activation::kReLU: return map<relu>(count, in, out);
    case Activation::kELU: return map<elu>(count, in, out);
    case Activation::kGELU: return map<gelu>(count, in, out);
    case Activation::kTanh: return map<tanh>(count, in, out);
    case Activation::kMish: return map<mish>(count, in, out);
    case Activation::kSoftplus: return map<softplus>(count, in, out);
  }
}

// Each lane of four vectors is a polynomial in its words, modulo 2^32. The shift carries differences in signs and
// exponents down, from where the odd factor spreads them.
struct Lanes {
  Bits sum[4] = {};

  void add(const void* words) {
    typedef std::uint32_t Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Bits word = static_cast<const Unaligned*>(words)[i];
      sum[i] = sum[i] * 0x9e3779b1u + (word ^ (word >> 15));
    }
  }
};

std::uint64_t hash(std::uint64_t seed, std::size_t bytes, const void* in, std::size_t part, std::size_t parts) {
  constexpr std::size_t kBlock = 4 * kBytes, kLine = 64, kPage = 4096, kPerPage = kPage / kBlock;
  const auto* const from = static_cast<const unsigned char*>(in);
  const std::size_t blocks = bytes / kBlock;
  Lanes lanes;
  for (std::size_t page = part * kPerPage; page < blocks; page += parts * kPerPage) {
    const std::size_t end = page + kPerPage < blocks ? page + kPerPage : blocks;
    for (std::size_t i = page; i < end; ++i) {
      const auto* const block = from + i * kBlock;
      for (std::size_t j = 0; j < kBlock; j += kLine) __builtin_prefetch(block + parts * kPage + j);
      lanes.add(block);
    }
  }
  std::size_t i = blocks * kBlock;
  unsigned char rest[kBlock] = {};
  for (std::size_t j = 0; i + j < bytes; ++j) rest[j] = from[i + j];
  lanes.add(rest);
  std::uint64_t result = seed + bytes;
  for (const Bits& sum : lanes.sum) {
    for (int j = 0; j < kLanes; ++j) {
      result = (result ^ sum[j]) * 0x9e3779b97f4a7c15u;
      result ^= result >> 32;
    }
  }
  return result;
}

}  // namespace

extern const Simd DPPO_FAST_JOIN(simd_, DPPO_FAST_SIMD);
const Simd DPPO_FAST_JOIN(simd_, DPPO_FAST_SIMD){DPPO_FAST_TEXT(DPPO_FAST_SIMD), kLanes, kVectors * kLanes, linear,
                                                 activate, hash};

}  // namespace dppo_fast
