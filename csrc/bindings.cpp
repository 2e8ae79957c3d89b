// The Python module dppo_fast._native: NumPy arrays in and out, the GIL released while computing. Nothing is converted:
// an array of another dtype is a TypeError, of another shape or layout a ValueError, and the message names the argument.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <string>
#include <vector>

#include "discounted_sum.h"
#include "gae.h"

namespace py = pybind11;

namespace {

using Shape = std::vector<py::ssize_t>;

std::string text(const py::handle& object) { return py::str(object).cast<std::string>(); }

template <typename T>
const T* data(const py::array& array, const std::string& name, const Shape& shape) {
  if (!py::isinstance<py::array_t<T, 0>>(array)) {
    throw py::type_error(name + " has dtype " + text(array.dtype()) + ", expected " + text(py::dtype::of<T>()));
  }
  if (Shape(array.shape(), array.shape() + array.ndim()) != shape) {
    throw py::value_error(name + " has shape " + text(array.attr("shape")) + ", expected " +
                          text(py::tuple(py::cast(shape))));
  }
  const py::object flags = array.attr("flags");
  if (!flags.attr("c_contiguous").cast<bool>() || !flags.attr("aligned").cast<bool>()) {
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

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU loops of dppo_fast: see dppo_fast.kernels, which calls them.";
  module.def("gae", &gae, py::arg("reward"), py::arg("value"), py::arg("bootstrap"), py::arg("last_value"),
             py::arg("terminated"), py::arg("truncated"), py::arg("gamma"), py::arg("lam"),
             "Advantages and returns, [T, N] each, of the dtype of reward (float32 or float64).");
  module.def("discounted_sum", &discounted_sum, py::arg("reward"), py::arg("first"), py::arg("carry"), py::arg("gamma"),
             "Discounted sums [T, N], float64, of float32 or float64 rewards.");
}
