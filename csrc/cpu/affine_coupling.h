// How an affine coupling goes through memory, strip by strip.
//
// Elements of a strip that lie side by side are read and written where they are; others - every second channel, indices in any order, a
// checkerboard - are gathered into a tile that stays in the first-level cache, and put back over a copy of what is around them. Where
// strips are so short that they leave vectors empty, several are computed together.
#pragma once

#include <functional>
#include <memory>

#include "cpu/affine_coupling_plan.h"

namespace fastgen::affine_coupling {
namespace {

// Where the elements of a tensor lie.
template <class T>
struct Place {
  T* data = nullptr;
  std::int64_t sample = 0, channel = 0, position = 0;

  T* at(std::int64_t n, std::int64_t c, std::int64_t p) const { return data + n * sample + c * channel + p * position; }
};

// Neighbours of one strip, in memory or in a tile; those that a call has not are null.
template <class T>
struct Spans {
  const T *grad = nullptr, *x = nullptr, *raw = nullptr, *shift = nullptr;
  T *y = nullptr, *d_raw = nullptr, *d_shift = nullptr;
};

// Elements from every second place, and to it.
template <class T>
inline void gather_second(T* __restrict to, const T* __restrict from, std::int64_t count) {
  std::int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for (; i + 16 <= count; i += 16) {  // the element behind the last is not touched
      const __m512 low = _mm512_loadu_ps(from + 2 * i), high = _mm512_maskz_loadu_ps(0x7fff, from + 2 * i + 16);
      _mm512_storeu_ps(to + i, _mm512_permutex2var_ps(low, even, high));
    }
  }
#endif
  for (; i < count; ++i) to[i] = from[2 * i];
}
template <class T>
inline void scatter_second(T* __restrict to, const T* __restrict from, std::int64_t count) {
  std::int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    for (; i + 8 <= count; i += 8)
      _mm512_mask_storeu_ps(to + 2 * i, 0x5555, _mm512_maskz_expand_ps(0x5555, _mm512_castps256_ps512(_mm256_loadu_ps(from + i))));
#endif
  for (; i < count; ++i) to[2 * i] = from[i];
}

template <class T>
inline void gather(T* to, const T* from, std::int64_t count, std::int64_t step, const std::int64_t* table) {
  if (step == 1) std::copy_n(from, count, to);
  else if (step == 2) gather_second(to, from, count);
  else for (std::int64_t i = 0; i < count; ++i) to[i] = from[table[i]];
}
template <class T>
inline void scatter(T* to, const T* from, std::int64_t count, std::int64_t step, const std::int64_t* table) {
  if (step == 1) std::copy_n(from, count, to);
  else if (step == 2) scatter_second(to, from, count);
  else for (std::int64_t i = 0; i < count; ++i) to[table[i]] = from[i];
}

// What is done to a strip: a function of its own for each dtype and form, called by its address, so that the way through memory is
// compiled once for a dtype. Where there are `values` it writes one an element, else it returns their sum, or, where the call has a way
// to finish them, the parts of one.
template <class T>
using Kernel = opmath_t<T> (*)(const Spans<T>& of, std::int64_t count, const Numbers<opmath_t<T>>& numbers,
                               const Besides<opmath_t<T>>& beside, opmath_t<T>* values, LogParts<opmath_t<T>>* parts);

// What becomes of the strips that were computed: sums are added to that of their item, or `values` takes those of each strip, in order.
template <class A>
struct Taken {
  A* sums = nullptr;
  std::function<void(std::int64_t n, std::int64_t p, const Strip&, const A* values)> values = {};
};

// The places of all tensors of a call, and the way through them.
template <class T>
struct Walk {
  using A = opmath_t<T>;

  const Plan& plan;
  Numbers<A> numbers;
  std::int64_t raw_step;
  Place<const T> grad, x, raw, shift;
  Place<T> y, d_raw, d_shift;
  const A* weight = nullptr;   // [C']
  const A* means = nullptr;    // what is taken from the logarithms: one a sample, or one a position
  const A* added = nullptr;    // to the gradients of the logarithms: the same
  bool a_position = false;
  Finish<A> finish = nullptr;

  // Calls `kernel` for the transformed strips of items [begin, end). Strips that are copied are, if `copies`.
  void run(std::int64_t begin, std::int64_t end, bool copies, Kernel<T> kernel, const Taken<A>& taken) const {
    if (plan.full) return run_strip_by_strip(begin, end, copies, kernel, taken);
    run_in_tiles(begin, end, copies, kernel, taken);
  }

  void copy(std::int64_t n, std::int64_t p, const Strip& s) const {
    const T* const from = (grad.data ? grad : x).at(n, s.channel, p);
    T* const to = y.at(n, s.channel, p);
    if constexpr (std::is_same_v<T, A>) {
      if (s.count <= kShort) for_vectors<A>(s.count, [&](std::int64_t i, auto at) { at.store(to + i, at.load(from + i)); });
      else std::copy_n(from, s.count, to);
    } else {
      std::copy_n(from, s.count, to);
    }
    if (!d_raw.data || !plan.checkerboard()) return;
    for (const Place<T>& to : {d_raw, d_shift})  // nothing depends on what is not read
      for (std::int64_t i = 0; i < s.count; ++i) to.at(n, s.channel, p)[i * raw_step_of_board()] = T{};
  }
 private:
  std::int64_t raw_step_of_board() const { return plan.rows ? raw_step : 1; }

  // Calls f(n, position, strip) for the strips of an item.
  template <class F>
  FASTGEN_INLINE void for_strips(std::int64_t item, const F& f) const {
    const std::int64_t n = plan.a_sample == 1 ? item : item / plan.a_sample, part = item - n * plan.a_sample;
    if (!plan.rows) {
      for (std::int64_t s = plan.first[part]; s < plan.first[part + 1]; ++s) f(n, plan.strips[0][s].position, plan.strips[0][s]);
      return;
    }
    const std::int64_t last = std::min((part + 1) * plan.block, plan.positions);
    for (std::int64_t p = part * plan.block; p < last; ++p)
      for (const Strip& s : plan.strips[plan.checkerboard() && !plan.chosen(p)]) f(n, p, s);
  }

  Besides<A> beside(std::int64_t n, std::int64_t p, const Strip& s) const {
    const auto number = [&](const A* of) -> Beside<A> {
      if (!of) return {};
      if (!a_position) return {nullptr, of[n]};
      return plan.rows ? Beside<A>{nullptr, of[n * plan.positions + p]} : Beside<A>{of + n * plan.positions + p, A(0)};
    };
    return {!weight ? Beside<A>{nullptr, numbers.bound} : plan.rows ? Beside<A>{weight + s.raw, A(0)} : Beside<A>{nullptr, weight[s.raw]},
            number(means), number(added)};
  }

  struct Packed {
    std::int64_t item, n, p, start;
    const Strip* strip;
  };

  // What is in order is read and written where it is.
  void run_strip_by_strip(std::int64_t begin, std::int64_t end, bool copies, Kernel<T> kernel, const Taken<A>& taken) const {
    const bool keep = static_cast<bool>(taken.values);
    const std::int64_t room = std::max(kLongest, std::max(plan.transformed, plan.width)), apart = plan.rows ? raw_step : plan.step;
    const std::unique_ptr<A[]> values(keep ? new A[room] : nullptr), of_means(a_position && !plan.rows ? new A[2 * room] : nullptr);
    const std::unique_ptr<T[]> tiles(plan.side_by_side ? nullptr : new T[7 * room]);
    const std::int64_t* const table = plan.indices.data();
    const auto read = [&](int tile, const T* from, std::int64_t count, std::int64_t step) {
      if (step == 1) return from;
      gather(tiles.get() + tile * room, from, count, step, table);
      return static_cast<const T*>(tiles.get() + tile * room);
    };
    const auto written = [&](int tile, T* to, std::int64_t step) { return step == 1 ? to : tiles.get() + tile * room; };
    const auto put = [&](T* to, const T* from, std::int64_t count, std::int64_t step) {
      if (step != 1) scatter(to, from, count, step, table);
    };
    LogParts<A> parts[kWaiting];
    std::int64_t items[kWaiting];  // of the parts
    int waiting = 0;
    const auto drain = [&] {
      A sums[kWaiting];
      if (waiting) finish(parts, waiting, numbers.power, sums);
      for (int i = 0; i < waiting; ++i) taken.sums[items[i]] += sums[i];
      waiting = 0;
    };
    for (std::int64_t item = begin; item < end; ++item)
      for_strips(item, [&](std::int64_t n, std::int64_t p, const Strip& s) {
        if (s.copied) {
          if (copies) copy(n, p, s);
          return;
        }
        T *const to = y.data ? y.at(n, s.channel, p) : nullptr;
        T *const to_raw = d_raw.data ? d_raw.at(n, s.raw, p) : nullptr, *const to_shift = to_raw ? d_shift.at(n, s.raw, p) : nullptr;
        const Spans<T> at{grad.data ? read(0, grad.at(n, s.channel, p), s.count, plan.step) : nullptr,
                          read(1, x.at(n, s.channel, p), s.count, plan.step),
                          read(2, raw.at(n, s.raw, p), s.count, apart),
                          read(3, shift.at(n, s.raw, p), s.count, apart),
                          to ? written(4, to, plan.step) : nullptr,
                          to_raw ? written(5, to_raw, apart) : nullptr,
                          to_raw ? written(6, to_shift, apart) : nullptr};
        Besides<A> besides = beside(n, p, s);
        if (plan.step == 2 && of_means)
          for (Beside<A>* of : {&besides.mean, &besides.added})
            if (of->each) {
              A* const second = of_means.get() + (of == &besides.added) * room;
              gather_second(second, of->each, s.count);
              of->each = second;
            }
        const A sum = kernel(at, s.count, numbers, besides, values.get(), parts + waiting);
        if (to) put(to, at.y, s.count, plan.step);
        if (to_raw) put(to_raw, at.d_raw, s.count, apart), put(to_shift, at.d_shift, s.count, apart);
        if (keep) return taken.values(n, p, s, values.get());
        if (!taken.sums) return;
        if (!finish) return void(taken.sums[item] += sum);
        items[waiting++] = item;
        if (waiting == kWaiting) drain();
      });
    drain();
  }

  // Several strips, each too short for a vector, are computed together.
  void run_in_tiles(std::int64_t begin, std::int64_t end, bool copies, Kernel<T> kernel, const Taken<A>& taken) const {
    const std::int64_t room = std::max(kTile, std::max(plan.transformed, plan.width));
    const std::unique_ptr<T[]> tiles(new T[7 * room]);
    const std::unique_ptr<A[]> numbers_of(new A[4 * room]);
    T* tile[7];
    for (int k = 0; k < 7; ++k) tile[k] = tiles.get() + k * room;
    A *const values = numbers_of.get(), *const weights = values + room, *const of_means = weights + room, *const of_added = of_means + room;
    const Besides<A> besides{weight ? Beside<A>{weights, A(0)} : Beside<A>{nullptr, numbers.bound}, means ? Beside<A>{of_means, A(0)} : Beside<A>{},
                             added ? Beside<A>{of_added, A(0)} : Beside<A>{}};
    const Spans<T> spans{grad.data ? tile[0] : nullptr, tile[1], tile[2], tile[3],
                         y.data ? tile[4] : nullptr, d_raw.data ? tile[5] : nullptr, d_raw.data ? tile[6] : nullptr};
    std::vector<Packed> packed;
    const std::int64_t* const table = plan.indices.data();
    const std::int64_t apart = plan.rows ? raw_step : plan.step;  // in raw scale and shift
    std::int64_t filled = 0;
    const auto flush = [&] {
      if (!filled) return;
      kernel(spans, filled, numbers, besides, values, nullptr);
      for (const auto& [item, n, p, start, s] : packed) {
        if (y.data) scatter(y.at(n, s->channel, p), tile[4] + start, s->count, plan.step, table);
        if (d_raw.data) {
          scatter(d_raw.at(n, s->raw, p), tile[5] + start, s->count, apart, table);
          scatter(d_shift.at(n, s->raw, p), tile[6] + start, s->count, apart, table);
        }
        if (taken.values) {
          taken.values(n, p, *s, values + start);
        } else if (taken.sums) {
          A sum(0);
          for (std::int64_t i = 0; i < s->count; ++i) sum += values[start + i];
          taken.sums[item] += sum;
        }
      }
      packed.clear();
      filled = 0;
    };
    for (std::int64_t item = begin; item < end; ++item)
      for_strips(item, [&](std::int64_t n, std::int64_t p, const Strip& s) {
        if (s.copied) {
          if (copies) copy(n, p, s);
          return;
        }
        if (filled + s.count > room) flush();
        packed.push_back({item, n, p, filled, &s});
        if (grad.data) gather(tile[0] + filled, grad.at(n, s.channel, p), s.count, plan.step, table);
        gather(tile[1] + filled, x.at(n, s.channel, p), s.count, plan.step, table);
        gather(tile[2] + filled, raw.at(n, s.raw, p), s.count, apart, table);
        gather(tile[3] + filled, shift.at(n, s.raw, p), s.count, apart, table);
        const Besides<A> of = beside(n, p, s);
        const auto spread = [&](bool given, const Beside<A>& from, std::int64_t step, A* to) {
          for (std::int64_t i = 0; given && i < s.count; ++i) to[filled + i] = from.each ? from.each[i * step] : from.same;
        };
        spread(weight, of.weight, 1, weights), spread(means, of.mean, plan.step, of_means), spread(added, of.added, plan.step, of_added);
        filled += s.count;
      });
    flush();
  }
};

// Where the elements of `t` lie; a dense copy of it, kept in `t`, where they do not lie along the strips.
template <class T>
Place<T> place_of(Tensor& t, const Plan& plan) {
  const SliceStrides s = as_slices(t, 1, plan.rows);
  return {static_cast<T*>(const_cast<void*>(static_cast<const void*>(t.data_ptr()))), s.sample, s.along, s.apart};
}

// Raw scale and shift of the packed tensor at `whole`.
template <class T>
inline void unpack(const Place<T>& whole, const Problem& p, Place<T>& raw, Place<T>& shift) {
  raw = shift = whole;
  const bool alternate = p.interleaved(), scale_first = p.layout == Layout::kScaleFirst || p.layout == Layout::kInterleavedScaleFirst;
  if (alternate) raw.channel = shift.channel = 2 * whole.channel;
  (scale_first ? shift : raw).data += (alternate ? 1 : p.plan.transformed) * whole.channel;
}

// The tensors that are read, in place or copied, and the plan cut for them.
template <class T>
struct Inputs {
  using A = opmath_t<T>;

  Tensor input, raw, shift, grad;
  std::vector<A> weight;
  Walk<T> walk;

  Inputs(Problem& p, const Tensor& input_, const Tensor& raw_, const OptionalTensor& shift_, const Tensor* grad_ = nullptr)
      : input(input_), raw(raw_), shift(shift_.value_or(raw_)), grad(grad_ ? *grad_ : input_), weight(p.weight.given() ? p.plan.transformed : 0),
        walk{p.plan, p.numbers<A>(), p.interleaved() ? 2 : 1, {}, {}, {}, {}, {}, {}, {}} {
    walk.x = place_of<const T>(input, p.plan);
    if (grad_) walk.grad = place_of<const T>(grad, p.plan);
    if (p.packed) {
      unpack(place_of<const T>(raw, p.plan), p, walk.raw, walk.shift);
    } else {
      walk.raw = place_of<const T>(raw, p.plan);
      walk.shift = place_of<const T>(shift, p.plan);
    }
    if (p.weight.given()) p.weight.read(0, 0, p.plan.transformed, A(1), weight.data()), walk.weight = weight.data();
    const auto together = [&](const Place<const T>& place) { return place.channel == p.plan.positions; };
    const bool copied = p.plan.channels == 1 || (together(walk.x) && (!grad_ || together(walk.grad)));
    const bool beside = p.plan.transformed == 1 || (together(walk.raw) && together(walk.shift));
    p.plan.cut(walk.raw_step, copied, copied && beside && !p.weight.given() && p.center != Center::kChannels);
  }
};

// The mean of the values of `kernel` over each sample, or each position of it.
template <class T>
std::vector<opmath_t<T>> means_of(const Walk<T>& walk, Center center, Kernel<T> kernel) {
  using A = opmath_t<T>;
  const Plan& plan = walk.plan;
  const bool a_position = center == Center::kChannels;
  std::vector<A> means(a_position ? plan.n * plan.positions : plan.n);
  const std::int64_t size = a_position ? plan.positions : 1;
  const double count = a_position ? plan.transformed : plan.of_sample();
  parallel(plan.n, plan.elements() * kWork, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> sums((end - begin) * size);
    const auto add = [&](std::int64_t n, std::int64_t p, const Strip& s, const A* values) {
      double* const of_sample = sums.data() + (n - begin) * size;
      if (a_position && !plan.rows) {
        for (std::int64_t i = 0; i < s.count; ++i) of_sample[p + i * plan.step] += static_cast<double>(values[i]);
      } else {
        of_sample[a_position ? p : 0] += sum_vectors<A>(s.count, [&](std::int64_t i, auto at) { return at.load(values + i); });
      }
    };
    walk.run(begin * plan.a_sample, end * plan.a_sample, false, kernel, {nullptr, add});
    for (std::size_t i = 0; i < sums.size(); ++i) means[begin * size + i] = static_cast<A>(sums[i] / count);
  });
  return means;
}

// The logarithms of the scales, before their mean is taken from them.
template <class T, Form form>
opmath_t<T> plain_logarithms(const Spans<T>& of, std::int64_t count, const Numbers<opmath_t<T>>& numbers,
                             const Besides<opmath_t<T>>& beside, opmath_t<T>* values, LogParts<opmath_t<T>>*) {
  using A = opmath_t<T>;
  for_vectors<A>(count, [&](std::int64_t i, auto at) {
    at.store(values + i, log_scale<A, form>(Vec<A>(at.load(of.raw + i) * numbers.gain), numbers, beside.weight.load(i, at)).value);
  });
  return A(0);
}

// Takes the means of the logarithms, where the scale has a center, into `means` and `walk`.
template <class T, Form form>
void center(Walk<T>& walk, Center center, std::vector<opmath_t<T>>& means) {
  if constexpr (!is_direct(form)) {
    if (center == Center::kNone) return;
    means = means_of<T>(walk, center, plain_logarithms<T, form>);
    walk.means = means.data(), walk.a_position = center == Center::kChannels;
  }
}

}  // namespace
}  // namespace fastgen::affine_coupling
