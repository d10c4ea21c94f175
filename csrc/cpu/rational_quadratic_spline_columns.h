// Parameters of a vector of elements as columns, one vector each, and their gradients the way back: rows of memory are turned over a square
// at a time, planes read as they lie, anything else is picked up number by number.
#pragma once

#include "cpu/rational_quadratic_spline_elements.h"

namespace fastgen::rational_quadratic_spline {

// Where the lanes of a vector of elements find their rows in one tensor of parameters.
template <class A>
struct Rows {
  std::int64_t at[kWidth<A>];
  bool side_by_side;  // each one behind the last: columns are planes
};

// The rows of elements [e, e + count); the lanes past them read the first.
template <class A>
FASTGEN_INLINE Rows<A> rows_of(const Problem& p, const Lie& lie, std::int64_t e, int count) {
  Rows<A> rows;
  if (lie.even) {
    for (int i = 0; i < kWidth<A>; ++i) rows.at[i] = (e + (i < count ? i : 0)) * lie.position;
    rows.side_by_side = lie.position == 1;
    return rows;
  }
  std::int64_t n = e / p.elements, rest = e - n * p.elements, j = rest / p.positions, s = rest - j * p.positions;
  rows.side_by_side = lie.position == 1 && s + count <= p.positions;
  for (int i = 0; i < count; ++i) {
    rows.at[i] = lie.at(n, j, s);
    if (++s == p.positions) {
      s = 0;
      if (++j == p.transformed()) j = 0, ++n;
    }
  }
  for (int i = count; i < kWidth<A>; ++i) rows.at[i] = rows.at[0];
  return rows;
}

template <class T, class A>
FASTGEN_INLINE void read_columns(const T* data, const Lie& lie, const Rows<A>& rows, int count, A* columns) {
  constexpr int width = kWidth<A>;
  if (lie.column == 1 && lie.columns > 1) {
    Vec<A> square[width];
    if (lie.columns < width) {
      const int few = static_cast<int>(lie.columns);
      for (int i = 0; i < width; ++i) square[i] = load_part(data + rows.at[i], few);
      transpose(square);
      for (int c = 0; c < few; ++c) store(columns + c * width, square[c]);
      return;
    }
    for (std::int64_t first = 0; first < lie.columns; first += width) {
      first = std::min(first, lie.columns - width);  // the last square overlaps the one before it
      for (int i = 0; i < width; ++i) square[i] = load(data + rows.at[i] + first);
      transpose(square);
      for (int c = 0; c < width; ++c) store(columns + (first + c) * width, square[c]);
    }
  } else if (rows.side_by_side) {
    for (std::int64_t c = 0; c < lie.columns; ++c) {
      const T* const from = data + rows.at[0] + c * lie.column;
      store(columns + c * width, count == width ? load(from) : load_part(from, count));
    }
  } else {
    for (std::int64_t c = 0; c < lie.columns; ++c)
      for (int i = 0; i < width; ++i) columns[c * width + i] = static_cast<A>(widen(data[rows.at[i] + c * lie.column]));
  }
}

template <class T, class A>
FASTGEN_INLINE void write_columns(T* data, const Lie& lie, const Rows<A>& rows, int count, const A* columns) {
  constexpr int width = kWidth<A>;
  if (lie.column == 1 && lie.columns > 1) {
    Vec<A> square[width];
    if (lie.columns < width) {
      const int few = static_cast<int>(lie.columns);
      for (int c = 0; c < width; ++c) square[c] = c < few ? load(columns + c * width) : Vec<A>(A(0));
      transpose(square);
      for (int i = 0; i < count; ++i) store_part(data + rows.at[i], square[i], few);
      return;
    }
    for (std::int64_t first = 0; first < lie.columns; first += width) {
      first = std::min(first, lie.columns - width);
      for (int c = 0; c < width; ++c) square[c] = load(columns + (first + c) * width);
      transpose(square);
      for (int i = 0; i < count; ++i) store(data + rows.at[i] + first, square[i]);
    }
  } else if (rows.side_by_side) {
    for (std::int64_t c = 0; c < lie.columns; ++c) {
      T* const to = data + rows.at[0] + c * lie.column;
      const Vec<A> column = load(columns + c * width);
      count == width ? store(to, column) : store_part(to, column, count);
    }
  } else {
    for (std::int64_t c = 0; c < lie.columns; ++c)
      for (int i = 0; i < count; ++i) data[rows.at[i] + c * lie.column] = narrow<T>(columns[c * width + i]);
  }
}

// The first column of each tensor of parameters among those of all.
inline std::int64_t first_column(const Problem& p, std::int64_t i) { return i * p.bins; }

// All parameters of elements [e, e + count).
template <class T, class A>
FASTGEN_INLINE void read_parameters(const Problem& p, std::int64_t e, int count, A* columns) {
  for (std::int64_t i = 0; i < p.count; ++i) {
    const Lie& lie = p.lies[i];
    read_columns<T, A>(static_cast<const T*>(p.parameters[i].data_ptr()), lie, rows_of<A>(p, lie, e, count), count,
                       columns + first_column(p, i) * kWidth<A>);
  }
}

// What threads own for the tiles they go through: rows of a tile, and the columns of a vector.
template <class A>
struct Workspace {
  static constexpr int kRows = 5;
  std::unique_ptr<A[]> memory;
  A *row[kRows], *columns, *work;

  explicit Workspace(const Problem& p) {
    constexpr int width = kWidth<A>;
    const std::int64_t padded = kTile + width, all = kRows * padded + (2 * p.columns + 1) * width;
    constexpr std::size_t line = 64;
    memory.reset(new A[all + line / sizeof(A)]());
    A* at = memory.get();
    at += (line - reinterpret_cast<std::uintptr_t>(at) % line) % line / sizeof(A);
    for (auto& r : row) r = at, at += padded;
    columns = at, at += (p.columns + 1) * width;
    work = at;
    store(columns + p.columns * width, Vec<A>(static_cast<A>(p.end())));
  }
};

template <class A>
FASTGEN_INLINE Box<A> box_of(const Problem& p, const A* half) {
  using V = Vec<A>;
  if (half != nullptr) {
    const V bound = load(half);
    return {-bound, bound, -bound, bound};
  }
  return p.box<A>();
}

// Calls f(std::integral_constant<Parametrization>, std::bool_constant<inverse>).
template <class F>
void dispatch_form(const Problem& p, const F& f) {
  const auto with = [&](auto kind) { p.inverse ? f(kind, std::true_type{}) : f(kind, std::false_type{}); };
  if (p.parametrization == Parametrization::kZuko) with(std::integral_constant<Parametrization, Parametrization::kZuko>{});
  else with(std::integral_constant<Parametrization, Parametrization::kNflows>{});
}

}  // namespace fastgen::rational_quadratic_spline
