// The denoising chain of an MLP policy; the formulas are in kernels/mlp_chain.py and kernels/denoise_step.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "simd.h"

namespace dppo_fast {

// weight [outputs, inputs], rows weight_stride floats apart; bias [outputs], or null for none.
struct Linear {
  std::size_t outputs;
  std::size_t inputs;
  std::size_t weight_stride;
  const float* weight;
  const float* bias;
};

struct FreeAligned {
  void operator()(float* floats) const { ::operator delete[](floats, std::align_val_t{kAlignment}); }
};
using AlignedFloats = std::unique_ptr<float[], FreeAligned>;

// A copy of an MLP's weights, in the order in which the kernels read them.
class PackedMLP {
 public:
  // layers[0] is the part of the first layer that sees x. Throws std::invalid_argument where they do not fit together.
  PackedMLP(const std::vector<Linear>& layers, Activation activation, bool residual, const Simd& simd);

  std::size_t actions() const { return actions_; }
  std::size_t hidden() const { return hidden_; }
  std::size_t width() const { return width_; }  // of the widest layer, padded

  // The network on rows of x, given the rest of its first layer's sum, time + obs. `h`, `a` and `u` are scratch rows of
  // `width` floats; the result is in one of them. Rows of time, obs and the scratch are aligned and padded. `used` is
  // scratch for `width` or, if these are more, `actions` numbers.
  Rows<const float> operator()(std::size_t rows, Rows<const float> x, const float* time, Rows<const float> obs,
                               Rows<float> h, Rows<float> a, Rows<float> u, std::uint32_t* used) const;

 private:
  struct Layer {
    std::size_t inputs;
    std::size_t outputs;  // padded
    AlignedFloats weights;
    AlignedFloats bias;
    bool finite;
  };

  Layer packed(const Linear& layer) const;

  const Simd& simd_;
  const Activation activation_;
  const bool residual_;
  std::size_t actions_;
  std::size_t hidden_;
  std::size_t width_ = 0;
  std::vector<Layer> layers_;
};

// A stretch of `steps` steps that one network denoises; time [steps, H], obs [B, H].
struct Segment {
  const PackedMLP* network;
  std::size_t steps;
  const float* time;
  const float* obs;
};

// A bound is infinite where there is none; without an eps_clip eps is not recomputed from the clipped x0.
struct ChainOptions {
  float x0_clip;
  float noise_clip;
  float action_clip;
  std::optional<float> eps_clip;
  std::size_t first;  // scored step; S for none
  std::size_t scored;  // leading elements of a chunk
  float min_std;
};

// Row-major: noise [S + 1, B, A], table [S, 7], std [S], action [B, A], points [B, S - first + 1, A], log_prob
// [B, S - first].
struct Chain {
  std::size_t steps;
  std::size_t batch;
  std::size_t actions;
  const float* noise;
  const float* table;
  const float* std;
  float* action;
  float* points;
  float* log_prob;
};

// The rows are spread over at most `threads` threads where the extension is built with OpenMP.
void mlp_chain(const std::vector<Segment>& segments, const ChainOptions& options, const Chain& chain,
               std::size_t threads);

}  // namespace dppo_fast
