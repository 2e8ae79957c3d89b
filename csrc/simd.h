// Dense layers and activations on vectors of floats, compiled once for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dppo_fast {

enum class Activation { kIdentity, kReLU, kELU, kGELU, kTanh, kMish, kSoftplus };

constexpr std::size_t kAlignment = 64;  // bytes; every pointer below to packed weights or to a row of outputs has it

// A linear layer as the kernels read it. The outputs, padded to a multiple of `lanes`, are cut into panels of at most
// `panel` of them; panel by panel, and for one input after the other, come the weights of the panel's outputs.
struct PackedLinear {
  std::size_t inputs;
  std::size_t outputs;  // padded
  const float* weights;
  const float* bias;
  bool finite;  // all weights are
};

// `rows` rows of floats, `stride` apart.
template <typename Float>
struct Rows {
  Float* data;
  std::size_t stride;
};

struct Simd {
  const char* name;
  std::size_t lanes;
  std::size_t panel;

  // out = in W^T + bias + add, where add is [rows, outputs] or null, and may be out. An element's sum runs over the
  // inputs in their order, whatever the number of rows: a row's result does not depend on the rows it comes with. The
  // weights of a single row, which takes longer to load than to multiply, are skipped where the input is 0, as ReLU
  // makes about half of them; `used` has room for the inputs' numbers.
  void (*linear)(const PackedLinear& layer, std::size_t rows, Rows<const float> in, Rows<const float> add,
                 Rows<float> out, std::uint32_t* used);

  // out = activation(in) for `count` floats, a multiple of `lanes`; out may be in.
  void (*activate)(Activation activation, std::size_t count, const float* in, float* out);

  // A hash of bytes at any address, as fast as they come from memory; of their pages of 4 KiB, only every `parts`th
  // from `part` on.
  std::uint64_t (*hash)(std::uint64_t seed, std::size_t bytes, const void* in, std::size_t part, std::size_t parts);
};

// Those that this processor can run, the fastest first.
const std::vector<const Simd*>& simd_levels();

}  // namespace dppo_fast
