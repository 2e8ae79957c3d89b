// The Python module dppo_fast._native: NumPy arrays in and out, the GIL released while computing. Nothing is converted:
// an array of another dtype is a TypeError, of another shape or layout a ValueError, and the message names the
// argument.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "discounted_sum.h"
#include "gae.h"
#include "mlp_chain.h"
#include "philox.h"
#include "simd.h"

namespace py = pybind11;

namespace {

using Shape = std::vector<py::ssize_t>;

std::string text(const py::handle& object) { return py::str(object).cast<std::string>(); }

template <typename T>
void require_dtype(const py::array& array, const std::string& name) {
  if (!py::isinstance<py::array_t<T, 0>>(array)) {
    throw py::type_error(name + " has dtype " + text(array.dtype()) + ", expected " + text(py::dtype::of<T>()));
  }
}

template <typename T>
const T* data(const py::array& array, const std::string& name, const Shape& shape) {
  require_dtype<T>(array, name);
  if (Shape(array.shape(), array.shape() + array.ndim()) != shape) {
    throw py::value_error(name + " has shape " + text(array.attr("shape")) + ", expected " +
                          text(py::tuple(py::cast(shape))));
  }
  const bool aligned = reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0;
  if ((array.flags() & py::array::c_style) == 0 || !aligned) {
    throw py::value_error(name + " is not C-contiguous and aligned");
  }
  return static_cast<const T*>(array.data());
}

Shape rollout_shape(const py::array& reward) {
  if (reward.ndim() != 2) {
    throw py::value_error("reward has shape " + text(reward.attr("shape")) + ", expected (T, N)");
  }
  return {reward.shape(0), reward.shape(1)};
}

// Calls compute(Real{}) with the dtype of reward, which all other floating-point arguments must share.
template <typename Compute>
auto with_dtype_of(const py::array& reward, Compute compute) {
  if (py::isinstance<py::array_t<float, 0>>(reward)) return compute(float{});
  if (py::isinstance<py::array_t<double, 0>>(reward)) return compute(double{});
  throw py::type_error("reward has dtype " + text(reward.dtype()) + ", expected float32 or float64");
}

py::tuple gae(const py::array& reward, const py::array& value, const py::array& bootstrap, const py::array& last_value,
              const py::array& terminated, const py::array& truncated, double gamma, double lambda) {
  return with_dtype_of(reward, [&](auto real) {
    using Real = decltype(real);
    const Shape shape = rollout_shape(reward);
    const dppo_fast::Rollout<Real> rollout{
        static_cast<std::size_t>(shape[0]),
        static_cast<std::size_t>(shape[1]),
        data<Real>(reward, "reward", shape),
        data<Real>(value, "value", shape),
        data<Real>(bootstrap, "bootstrap", shape),
        data<Real>(last_value, "last_value", {shape[1]}),
        data<bool>(terminated, "terminated", shape),
        data<bool>(truncated, "truncated", shape),
    };
    py::array_t<Real> advantage(shape);
    py::array_t<Real> returns(shape);
    Real* const advantage_out = advantage.mutable_data();
    Real* const returns_out = returns.mutable_data();
    {
      const py::gil_scoped_release release;
      dppo_fast::gae(rollout, gamma, lambda, advantage_out, returns_out);
    }
    return py::tuple(py::make_tuple(advantage, returns));
  });
}

py::array_t<double> discounted_sum(const py::array& reward, const py::array& first, const py::array& carry,
                                   double gamma) {
  return with_dtype_of(reward, [&](auto real) {
    using Real = decltype(real);
    const Shape shape = rollout_shape(reward);
    const Real* const reward_in = data<Real>(reward, "reward", shape);
    const bool* const first_in = data<bool>(first, "first", shape);
    const double* const carry_in = data<double>(carry, "carry", {shape[1]});
    py::array_t<double> sum(shape);
    double* const sum_out = sum.mutable_data();
    {
      const py::gil_scoped_release release;
      dppo_fast::discounted_sum(static_cast<std::size_t>(shape[0]), static_cast<std::size_t>(shape[1]), reward_in,
                                first_in, carry_in, gamma, sum_out);
    }
    return sum;
  });
}

py::array_t<float> keyed_normal(std::uint64_t seed, const py::array& env, const py::array& step, std::size_t draws,
                                std::size_t size) {
  const Shape batch{env.size()};
  const std::int64_t* const env_in = data<std::int64_t>(env, "env", batch);
  const std::int64_t* const step_in = data<std::int64_t>(step, "step", batch);
  py::array_t<float> normals(std::vector<std::size_t>{draws, static_cast<std::size_t>(batch[0]), size});
  float* const out = normals.mutable_data();
  {
    const py::gil_scoped_release release;
    dppo_fast::keyed_normal(seed, static_cast<std::size_t>(batch[0]), env_in, step_in, draws, size, out);
  }
  return normals;
}

std::uint64_t digest(const std::vector<py::array>& arrays, std::size_t part, std::size_t parts) {
  if (part >= parts) throw py::value_error("part is " + std::to_string(part) + " of " + std::to_string(parts));
  constexpr py::ssize_t kSmall = 256 * 1024;
  std::uint64_t result = arrays.size();
  for (const py::array& array : arrays) {
    const py::array rows = py::array::ensure(array, py::array::c_style);
    const bool whole = rows.nbytes() <= kSmall;
    result = dppo_fast::simd_levels().front()->hash(result, static_cast<std::size_t>(rows.nbytes()), rows.data(),
                                                    whole ? 0 : part, whole ? 1 : parts);
  }
  return result;
}

using Layers = std::vector<std::pair<py::array, std::optional<py::array>>>;

// The weights may be views of which the rows are contiguous.
std::vector<dppo_fast::Linear> linear_layers(const Layers& layers) {
  constexpr auto kFloat = static_cast<py::ssize_t>(sizeof(float));
  std::vector<dppo_fast::Linear> result;
  for (const auto& [weight, bias] : layers) {
    const std::string name = "layer " + std::to_string(result.size());
    require_dtype<float>(weight, name + " weight");
    if (weight.ndim() != 2) throw py::value_error(name + " weight has shape " + text(weight.attr("shape")));
    if (weight.strides(1) != kFloat || weight.strides(0) % kFloat != 0 || weight.strides(0) < 0) {
      throw py::value_error(name + " weight has strides " + text(weight.attr("strides")));
    }
    result.push_back({static_cast<std::size_t>(weight.shape(0)), static_cast<std::size_t>(weight.shape(1)),
                      static_cast<std::size_t>(weight.strides(0) / kFloat), static_cast<const float*>(weight.data()),
                      bias ? data<float>(*bias, name + " bias", {weight.shape(0)}) : nullptr});
  }
  return result;
}

const dppo_fast::Simd& simd_named(const std::optional<std::string>& name) {
  const auto& levels = dppo_fast::simd_levels();
  if (!name) return *levels.front();
  for (const dppo_fast::Simd* level : levels) {
    if (level->name == *name) return *level;
  }
  throw py::value_error("simd is " + *name + ", which is none of simd_levels");
}

std::unique_ptr<dppo_fast::PackedMLP> packed_mlp(const Layers& layers, const std::string& activation, bool residual,
                                                 const std::optional<std::string>& simd) {
  using dppo_fast::Activation;
  static const std::map<std::string, Activation> activations{
      {"Identity", Activation::kIdentity}, {"ReLU", Activation::kReLU}, {"ELU", Activation::kELU},
      {"GELU", Activation::kGELU},         {"Tanh", Activation::kTanh}, {"Mish", Activation::kMish},
      {"Softplus", Activation::kSoftplus}};
  const auto found = activations.find(activation);
  if (found == activations.end()) throw py::value_error("activation is " + activation + ", which is unknown");
  return std::make_unique<dppo_fast::PackedMLP>(linear_layers(layers), found->second, residual, simd_named(simd));
}

using Segments = std::vector<std::tuple<const dppo_fast::PackedMLP*, py::array, py::array>>;

py::tuple mlp_chain(const Segments& segments, const py::array& noise, const py::array& table, const py::array& std,
                    float x0_clip, float noise_clip, float action_clip, std::optional<float> eps_clip,
                    std::size_t first, std::size_t scored, float min_std, std::size_t threads) {
  if (noise.ndim() != 3 || noise.shape(0) < 2) {
    throw py::value_error("noise has shape " + text(noise.attr("shape")) + ", expected (S + 1, B, A)");
  }
  const py::ssize_t steps = noise.shape(0) - 1, batch = noise.shape(1), actions = noise.shape(2);
  if (first > static_cast<std::size_t>(steps) || scored < 1 || scored > static_cast<std::size_t>(actions)) {
    throw py::value_error("first is " + std::to_string(first) + " of " + std::to_string(steps) + " steps, scored " +
                          std::to_string(scored) + " of " + std::to_string(actions));
  }
  std::vector<dppo_fast::Segment> parts;
  py::ssize_t left = steps;
  for (const auto& [network, time, obs] : segments) {
    if (network->actions() != static_cast<std::size_t>(actions)) {
      throw py::value_error("a network for chunks of " + std::to_string(network->actions()) + ", noise is for " +
                            std::to_string(actions));
    }
    const auto hidden = static_cast<py::ssize_t>(network->hidden());
    const py::ssize_t n = time.ndim() == 2 ? time.shape(0) : 0;
    parts.push_back({network, static_cast<std::size_t>(n), data<float>(time, "time", {n, hidden}),
                     data<float>(obs, "obs", {batch, hidden})});
    left -= n;
  }
  if (left != 0) throw py::value_error("the segments do not have " + std::to_string(steps) + " steps together");
  const auto scored_steps = steps - static_cast<py::ssize_t>(first);
  py::array_t<float> action(Shape{batch, actions});
  py::array_t<float> points(Shape{batch, scored_steps + 1, actions});
  py::array_t<float> log_prob(Shape{batch, scored_steps});
  const dppo_fast::ChainOptions options{x0_clip, noise_clip, action_clip, eps_clip, first, scored, min_std};
  const dppo_fast::Chain chain{static_cast<std::size_t>(steps),
                               static_cast<std::size_t>(batch),
                               static_cast<std::size_t>(actions),
                               data<float>(noise, "noise", {steps + 1, batch, actions}),
                               data<float>(table, "table", {steps, 7}),
                               data<float>(std, "std", {steps}),
                               action.mutable_data(),
                               points.mutable_data(),
                               log_prob.mutable_data()};
  {
    const py::gil_scoped_release release;
    dppo_fast::mlp_chain(parts, options, chain, threads);
  }
  return py::make_tuple(action, points, log_prob);
}

std::vector<std::string> simd_names() {
  std::vector<std::string> names;
  for (const dppo_fast::Simd* level : dppo_fast::simd_levels()) names.emplace_back(level->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU loops of dppo_fast: see dppo_fast.kernels, which calls them.";
  module.def("gae", &gae, py::arg("reward"), py::arg("value"), py::arg("bootstrap"), py::arg("last_value"),
             py::arg("terminated"), py::arg("truncated"), py::arg("gamma"), py::arg("lam"),
             "Advantages and returns, [T, N] each, of the dtype of reward (float32 or float64).");
  module.def("discounted_sum", &discounted_sum, py::arg("reward"), py::arg("first"), py::arg("carry"), py::arg("gamma"),
             "Discounted sums [T, N], float64, of float32 or float64 rewards.");
  module.def("keyed_normal", &keyed_normal, py::arg("seed"), py::arg("env"), py::arg("step"), py::arg("draws"),
             py::arg("size"), "Standard normals [draws, B, size], float32, for int64 env and step [B].");
  module.def("digest", &digest, py::arg("arrays"), py::arg("part") = 0, py::arg("parts") = 1,
             "A 64-bit hash of what the arrays hold, of any dtype and layout; of those larger than 256 KiB, one of "
             "several parts, each of which has pages from everywhere.");
  module.attr("simd_levels") = py::tuple(py::cast(simd_names()));
  py::class_<dppo_fast::PackedMLP>(module, "PackedMLP", "A copy of an MLP's weights, laid out for mlp_chain.")
      .def(py::init(&packed_mlp), py::arg("layers"), py::arg("activation"), py::arg("residual"),
           py::arg("simd") = py::none(),
           "Of (weight [n_out, n_in], bias [n_out] or None) pairs; simd is one of simd_levels, by default the first.");
  module.def("mlp_chain", &mlp_chain, py::arg("segments"), py::arg("noise"), py::arg("table"), py::arg("std"),
             py::arg("x0_clip"), py::arg("noise_clip"), py::arg("action_clip"), py::arg("eps_clip"), py::arg("first"),
             py::arg("scored"), py::arg("min_std"), py::arg("threads"),
             "The last x [B, A] of a chain, points [B, S - first + 1, A] and log-probs [B, S - first]; segments are "
             "(PackedMLP, time [n, H], obs [B, H]). Bounds may be infinite, and eps_clip None.");
}
