#include "mlp_chain.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace dppo_fast {
namespace {

constexpr std::size_t kLine = kAlignment / sizeof(float);
constexpr std::size_t kBlockRows = 60;  // their activations stay in the second-level cache
constexpr std::size_t kCoefficients = 7;

constexpr std::size_t blocks_of(std::size_t n, std::size_t size) { return (n + size - 1) / size; }
constexpr std::size_t round_up(std::size_t n, std::size_t size) { return blocks_of(n, size) * size; }

AlignedFloats zeros(std::size_t count) {
  AlignedFloats floats(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{kAlignment})));
  std::fill_n(floats.get(), count, 0.0f);
  return floats;
}

// As torch.clamp: NaN stays NaN.
float clamp(float x, float bound) { return std::clamp(x, -bound, bound); }

// How many threads to use of those that are there; fewer rows do not pay for one.
std::size_t worker_count([[maybe_unused]] std::size_t batch, [[maybe_unused]] std::size_t threads) {
#ifdef _OPENMP
  constexpr std::size_t kMinRows = 12;
  return std::clamp<std::size_t>(batch / kMinRows, 1, std::max<std::size_t>(threads, 1));
#else
  return 1;
#endif
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// The buffers of one thread, each of `rows` rows.
struct Scratch {
  std::size_t rows;
  std::size_t stride;
  std::vector<float> x;
  AlignedFloats floats;
  std::vector<std::uint32_t> used;

  // One cache line more than the width: rows a power of two apart would all fall into a few sets of the cache.
  Scratch(std::size_t rows, std::size_t actions, std::size_t width)
      : rows(rows),
        stride(round_up(width, kLine) + kLine),
        x(rows * actions),
        floats(zeros((4 * rows + 1) * stride)),
        used(std::max(actions, width)) {}

  Rows<float> buffer(std::size_t i) const { return {floats.get() + i * rows * stride, stride}; }
};

template <typename Float>
Rows<const Float> readable(Rows<Float> rows) {
  return {rows.data, rows.stride};
}

struct Score {
  float std;
  float log_std;
  std::size_t scored;
  double sum = 0;

  void add(float x, float mean) {
    constexpr float kHalfLogTwoPi = 0.918938533f;
    const float z = (x - mean) / std;
    sum += std::clamp(-0.5f * (z * z) - log_std - kHalfLogTwoPi, -5.0f, 2.0f);
  }
  float mean() const { return static_cast<float>(sum / static_cast<double>(scored)); }
};

// Step k of rows [begin, end): x becomes x'.
void denoise(const Chain& chain, const ChainOptions& options, std::size_t k, std::size_t begin, std::size_t end,
             Rows<const float> network, float* x) {
  const std::size_t actions = chain.actions, scored_steps = chain.steps - options.first;
  const float* const row = chain.table + k * kCoefficients;
  const float cx = row[0], ce = row[1], m0 = row[2], mx = row[3], sa = row[5], s = row[6];
  const float density_std = std::max(row[4], options.min_std), log_std = std::log(density_std);
  const bool last = k + 1 == chain.steps;
  for (std::size_t b = begin; b < end; ++b, network.data += network.stride, x += actions) {
    const float* const noise = chain.noise + ((k + 1) * chain.batch + b) * actions;
    Score score{density_std, log_std, options.scored};
    for (std::size_t i = 0; i < actions; ++i) {
      const float x0 = clamp(cx * x[i] + ce * network.data[i], options.x0_clip);
      float mean = m0 * x0 + mx * x[i];
      if (options.eps_clip) mean = (m0 + mx * sa) * x0 + mx * s * clamp((x[i] - sa * x0) / s, *options.eps_clip);
      x[i] = mean + chain.std[k] * clamp(noise[i], options.noise_clip);
      if (last) x[i] = clamp(x[i], options.action_clip);
      if (i < options.scored) score.add(x[i], mean);
    }
    if (last) std::copy_n(x, actions, chain.action + b * actions);
    if (k + 1 >= options.first) {
      std::copy_n(x, actions, chain.points + (b * (scored_steps + 1) + k + 1 - options.first) * actions);
    }
    if (k >= options.first) chain.log_prob[b * scored_steps + k - options.first] = score.mean();
  }
}

void run(const std::vector<Segment>& segments, const ChainOptions& options, const Chain& chain, std::size_t begin,
         std::size_t end, Scratch& scratch) {
  const std::size_t rows = end - begin, actions = chain.actions;
  const Rows<float> obs = scratch.buffer(0), h = scratch.buffer(1), a = scratch.buffer(2), u = scratch.buffer(3);
  float* const time = scratch.buffer(4).data;
  float* const x = scratch.x.data();
  std::copy_n(chain.noise + begin * actions, rows * actions, x);
  if (options.first == 0) {
    for (std::size_t r = 0; r < rows; ++r) {
      std::copy_n(x + r * actions, actions, chain.points + (begin + r) * (chain.steps + 1) * actions);
    }
  }
  std::size_t k = 0;
  for (const Segment& segment : segments) {
    const std::size_t hidden = segment.network->hidden();
    for (std::size_t r = 0; r < rows; ++r) {
      std::copy_n(segment.obs + (begin + r) * hidden, hidden, obs.data + r * obs.stride);
    }
    for (std::size_t i = 0; i < segment.steps; ++i, ++k) {
      std::copy_n(segment.time + i * hidden, hidden, time);
      const Rows<const float> output =
          (*segment.network)(rows, {x, actions}, time, readable(obs), h, a, u, scratch.used.data());
      denoise(chain, options, k, begin, end, output, x);
    }
  }
}

}  // namespace

PackedMLP::PackedMLP(const std::vector<Linear>& layers, Activation activation, bool residual, const Simd& simd)
    : simd_(simd), activation_(activation), residual_(residual) {
  require(layers.size() >= 2 && (!residual || layers.size() % 2 == 0),
          "an MLP of " + std::to_string(layers.size()) + " layers" + (residual ? " has no residual blocks" : ""));
  actions_ = layers.front().inputs;
  hidden_ = layers.front().outputs;
  std::size_t inputs = actions_;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const bool last = i + 1 == layers.size();
    const Linear& layer = layers[i];
    require(layer.inputs == inputs && (!last || layer.outputs == actions_) &&
                (last || !residual || layer.outputs == hidden_),
            "layer " + std::to_string(i) + " does not fit: it has " + std::to_string(layer.inputs) + " inputs and " +
                std::to_string(layer.outputs) + " outputs");
    inputs = layer.outputs;
    layers_.push_back(packed(layer));
    width_ = std::max(width_, layers_.back().outputs);
  }
}

PackedMLP::Layer PackedMLP::packed(const Linear& layer) const {
  const std::size_t outputs = round_up(layer.outputs, simd_.lanes);
  AlignedFloats weights = zeros(layer.inputs * outputs), bias = zeros(outputs);
  if (layer.bias != nullptr) std::copy_n(layer.bias, layer.outputs, bias.get());
  bool finite = true;
  for (std::size_t n = 0; n < layer.outputs; ++n) {
    const std::size_t start = n / simd_.panel * simd_.panel;
    const std::size_t panel = std::min(simd_.panel, outputs - start);
    float* const to = weights.get() + start * layer.inputs + (n - start);
    const float* const from = layer.weight + n * layer.weight_stride;
    for (std::size_t k = 0; k < layer.inputs; ++k) to[k * panel] = from[k];
    finite = finite && std::all_of(from, from + layer.inputs, [](float weight) { return std::isfinite(weight); });
  }
  return {layer.inputs, outputs, std::move(weights), std::move(bias), finite};
}

Rows<const float> PackedMLP::operator()(std::size_t rows, Rows<const float> x, const float* time,
                                        Rows<const float> obs, Rows<float> h, Rows<float> a, Rows<float> u,
                                        std::uint32_t* used) const {
  const auto linear = [&](const Layer& layer, const float* bias, Rows<const float> in, Rows<const float> add,
                          Rows<float> out) {
    simd_.linear({layer.inputs, layer.outputs, layer.weights.get(), bias, layer.finite}, rows, in, add, out, used);
  };
  const auto activate = [&](const Layer& after, Rows<float> in, Rows<float> out) {
    for (std::size_t r = 0; r < rows; ++r) {
      simd_.activate(activation_, after.outputs, in.data + r * in.stride, out.data + r * out.stride);
    }
  };
  const Rows<const float> nothing{};
  linear(layers_.front(), time, x, obs, h);
  if (!residual_) {
    for (std::size_t i = 1; i < layers_.size(); ++i) {
      activate(layers_[i - 1], h, h);
      linear(layers_[i], layers_[i].bias.get(), readable(h), nothing, a);
      std::swap(h, a);
    }
    return readable(h);
  }
  for (std::size_t i = 1; i + 1 < layers_.size(); i += 2) {
    activate(layers_[i - 1], h, a);
    linear(layers_[i], layers_[i].bias.get(), readable(a), nothing, u);
    activate(layers_[i], u, u);
    linear(layers_[i + 1], layers_[i + 1].bias.get(), readable(u), readable(h), h);
  }
  linear(layers_.back(), layers_.back().bias.get(), readable(h), nothing, a);
  return readable(a);
}

void mlp_chain(const std::vector<Segment>& segments, const ChainOptions& options, const Chain& chain,
               std::size_t threads) {
  const std::size_t workers = worker_count(chain.batch, threads);
  const std::size_t blocks = round_up(blocks_of(std::max<std::size_t>(chain.batch, 1), kBlockRows), workers);
  std::size_t width = 0;
  for (const Segment& segment : segments) width = std::max(width, segment.network->width());
  const std::size_t rows = blocks_of(chain.batch, blocks);
  std::vector<Scratch> scratches;
  for (std::size_t i = 0; i < workers; ++i) scratches.emplace_back(rows, chain.actions, width);
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(workers)) if (workers > 1)
#endif
  for (std::size_t worker = 0; worker < workers; ++worker) {
    for (std::size_t i = worker; i < blocks; i += workers) {
      run(segments, options, chain, i * chain.batch / blocks, (i + 1) * chain.batch / blocks, scratches[worker]);
    }
  }
}

}  // namespace dppo_fast
