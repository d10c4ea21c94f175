// What all splines of a call have in common, checked: the numbers of SPLINE_NUMBERS, and where their slopes lie among the columns.
#pragma once

#include <cmath>

#include "common/tensor.h"
#include "cpu/_spline.h"

namespace fastgen::rational_quadratic_spline {

// `numbers`, in the order of SPLINE_NUMBERS.
enum Number { kLeft, kRight, kBottom, kTop, kMinBinWidth, kMinBinHeight, kMinDerivative, kScale, kNumNumbers };

using Numbers = std::vector<double>;

struct Definition {
  std::int64_t bins, derivatives = 0;
  Numbers numbers;
  Tails tails;
  Parametrization parametrization;
  std::vector<std::int64_t> knots;  // the columns of the K + 1 slopes
  std::int64_t columns = 0;         // of all parameters; one more is constant

  Definition(const char* op, const Numbers& numbers, std::int64_t num_bins, std::int64_t tails, std::int64_t parametrization)
      : bins(num_bins), numbers(numbers), tails(static_cast<Tails>(tails)), parametrization(static_cast<Parametrization>(parametrization)) {
    FASTGEN_CHECK(num_bins >= 1, op, ": num_bins must be at least 1, got ", num_bins);
    FASTGEN_CHECK(tails >= 0 && tails <= 2, op, ": tails must be an index of SPLINE_TAILS, got ", tails);
    FASTGEN_CHECK(parametrization == 0 || parametrization == 1, op, ": parametrization must be an index of SPLINE_PARAMETRIZATIONS, got ",
                  parametrization);
    check_numbers(op);
  }

  // Of the columns of one element, given together: whether they are so many widths, heights and slopes.
  bool takes(std::int64_t given) const { return given - 2 * bins == usual() || given == 3 * bins + 1; }
  std::int64_t usual() const { return bins - 1 + static_cast<std::int64_t>(tails); }  // number of slopes

  void set_derivatives(std::int64_t count) {
    derivatives = count, columns = 2 * bins + count;
    const std::int64_t first = 2 * bins, ends = count == bins - 1 ? 1 : 0;  // knots before the first column
    knots.clear();
    for (std::int64_t k = 0; k <= bins; ++k) knots.push_back(first + k - ends);
    if (tails == Tails::kLinear) knots.front() = knots.back() = columns;
    if (tails == Tails::kCircular) knots.back() = first;
  }

  template <class A>
  Form<A> form() const {
    const auto at = [&](Number i) { return static_cast<A>(numbers[i]); };
    const auto rest = [&](Number i) { return TwoParts<A>(1 - static_cast<double>(bins) * numbers[i]); };
    return {bins, derivatives, tails, at(kMinBinWidth), at(kMinBinHeight), at(kMinDerivative), at(kScale), static_cast<A>(-1 / std::log(numbers[kMinDerivative])),
            knots.data(), rest(kMinBinWidth), rest(kMinBinHeight)};
  }
  template <class A>
  Box<A> box() const {
    const auto edge = [&](Number i) { return Vec<A>(static_cast<A>(numbers[i])); };
    return {edge(kLeft), edge(kRight), edge(kBottom), edge(kTop)};
  }
  // What stands for the slope at the ends of linear tails: 1.
  double end() const { return parametrization == Parametrization::kZuko ? 0 : std::log(std::expm1(1 - numbers[kMinDerivative])); }

 private:
  void check_numbers(const char* op) const {
    FASTGEN_CHECK(numbers.size() == kNumNumbers, op, ": numbers must be those of SPLINE_NUMBERS, got ", numbers.size(), " of them");
    FASTGEN_CHECK(numbers[kLeft] < numbers[kRight] && numbers[kBottom] < numbers[kTop], op, ": the box must not be empty");
    const double narrow = std::min(numbers[kMinBinWidth], numbers[kMinBinHeight]), wide = std::max(numbers[kMinBinWidth], numbers[kMinBinHeight]);
    FASTGEN_CHECK(narrow >= 0 && wide * static_cast<double>(bins) <= 1, op, ": min_bin_width and min_bin_height must be in [0, 1 / num_bins]");
    const bool below_one = parametrization == Parametrization::kZuko || tails == Tails::kLinear;
    const double least = numbers[kMinDerivative];
    FASTGEN_CHECK(least > 0 && (below_one ? least < 1 : std::isfinite(least)), op, ": min_derivative must be in (0, ", below_one ? "1)" : "inf)",
                  ", got ", least);
  }
};

}  // namespace fastgen::rational_quadratic_spline
