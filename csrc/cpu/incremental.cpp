// incremental: images drawn pixel by pixel, each layer of the network computed once for each place.
//
// Once a row, before its first pixel, the taps that read the rows above, and whole layers that read nothing else, are computed for all
// columns together: matrix products that read each weight once a row. A pixel's own work is the taps to its left. Both, the draw and
// what follows from it are instructions of a program (incremental_program.h), and one parallel region goes through all of them: threads
// take images where there are enough for all, and then never wait for one another; else they take outputs, and wait after each stage.
#include <atomic>

#include "common/sampling.h"
#include "incremental_machine.h"
#include "incremental_team.h"

namespace fastgen::incremental {
namespace {

constexpr double kThreadWork = 49152;  // multiply-adds of a pixel worth a second thread where it waits after every stage: 3 us

enum class DrawKind { kCategorical, kBernoulli, kLogisticMixture };  // DRAWS

struct Draw {  // DRAW_COLUMNS
  DrawKind kind;
  std::int64_t count, level_stride, color_stride, top_k, levels;
  std::uint32_t step;
  double temperature, top_p;
};

Draw draw_of(const char* op, const Program& p, const std::vector<std::int64_t>& draw, std::int64_t values, double temperature, double top_p) {
  FASTGEN_CHECK(draw.size() == 7, op, ": draw must hold 7 numbers, got ", draw.size());
  FASTGEN_CHECK(draw[0] >= 0 && draw[0] <= 2, op, ": draw has kind ", draw[0], ", which must be in [0, 2]");
  FASTGEN_CHECK(temperature >= 0 && std::isfinite(temperature), op, ": temperature must be finite and not negative, got ", temperature);
  FASTGEN_CHECK(top_p > 0 && top_p <= 1, op, ": top_p must be in (0, 1], got ", top_p);
  const Draw d{static_cast<DrawKind>(draw[0]), draw[1], draw[2], draw[3], draw[4], draw[5], static_cast<std::uint32_t>(draw[6]), temperature, top_p};
  const std::int64_t most = std::int64_t{1} << 31;
  FASTGEN_CHECK(d.count >= 1 && d.count < most && d.level_stride >= 0 && d.level_stride < most && d.color_stride >= 0 && d.color_stride < most &&
                    d.top_k >= 0 && (d.levels == 0 || d.levels >= 2), op, ": draw has a count, a stride, top_k or levels that cannot be");
  std::int64_t channels = (d.count - 1) * d.level_stride + (p.colors - 1) * d.color_stride + 1;
  std::int64_t needed = d.count;
  if (d.kind == DrawKind::kBernoulli) channels = (p.colors - 1) * d.color_stride + 1, needed = 2;
  if (d.kind == DrawKind::kLogisticMixture) {
    FASTGEN_CHECK(p.colors == 1 || p.colors == 3, op, ": a mixture of logistics has 1 color or 3, the image has ", p.colors);
    FASTGEN_CHECK(!p.per_color, op, ": a mixture of logistics draws the colors of a pixel together");
    channels = (p.colors == 1 ? 3 : 10) * d.count, needed = 0;
  }
  FASTGEN_CHECK(channels <= p.output_channels, op, ": draw reads ", channels, " logits where the program has ", p.output_channels);
  FASTGEN_CHECK(values >= needed, op, ": levels must hold ", needed, " values, got ", values);
  return d;
}

// The stages of a program that come at one moment, as ranges of its instructions.
struct Stages {
  std::vector<std::pair<const Instruction*, const Instruction*>> ranges;

  Stages(const Program& program, Moment moment) {
    const Instruction *const begin = program.instructions.data(), *const end = begin + program.instructions.size();
    for (const Instruction* i = begin; i < end;) {
      const Instruction* j = i;
      while (j < end && run_at(*j) == run_at(*i) && j->stage == i->stage) ++j;
      if (run_at(*i) == moment) ranges.emplace_back(i, j);
      i = j;
    }
  }
};

// Images with what is known of them, and what comes out.
template <class T>
struct Images {
  const T* given;     // [N, C, H, W]
  const bool* known;  // the same, or null
  const T* values;    // of the levels
  std::int64_t levels;
  const std::int64_t* seeds;
  T *out, *log_prob, *logits;  // [N, C, H, W], [N, H, W], [N, O, H, W] or null
};

template <class T>
class Sampler {
 public:
  Sampler(const Program& program, Machine<T>& machine, std::int64_t images)
      : program_(program), machine_(machine), images_(images), row_(program, Moment::kRow), pixel_(program, Moment::kPixel), after_(program, Moment::kAfter) {}

  // Everything, as one of `parts` threads.
  void sample(const Images<T>& io, const Draw& draw, Share share, Team& team) {
    for (std::int64_t y = 0; y < program_.height; ++y) {
      begin_row(y, share, team);
      for (std::int64_t x = 0; x < program_.width; ++x) {
        const std::int64_t turns = program_.per_color ? program_.colors : 1;
        pixel(y, x, share, team);
        for (std::int64_t turn = 0; turn < turns; ++turn) {
          if (program_.per_color) after(y, x, share, team);
          const std::int64_t first = program_.per_color ? turn : 0, last = program_.per_color ? turn + 1 : program_.colors;
          for (std::int64_t n = share.first; n < share.last; ++n)
            if (share.parts == 1 || n % share.parts == share.part) draw_pixel(io, draw, n, y, x, first, last);
          Verdict verdict = bad_.load(std::memory_order_relaxed) >= 0 ? Verdict::kStop : team.late() ? Verdict::kDissolve : Verdict::kGoOn;
          if (share.parts > 1) verdict = team.wait(share.part == 0, verdict);
          if (verdict == Verdict::kStop || (verdict == Verdict::kDissolve && share.part > 0)) return;
          if (verdict == Verdict::kDissolve && share.parts > 1) share = {0, images_, 0, 1};
        }
        after(y, x, share, team);
      }
    }
  }

  void begin_row(std::int64_t y, const Share& share, Team& team) { run(row_, y, -1, share, team); }
  void pixel(std::int64_t y, std::int64_t x, const Share& share, Team& team) { run(pixel_, y, x, share, team); }
  void after(std::int64_t y, std::int64_t x, const Share& share, Team& team) { run(after_, y, x, share, team); }

  // The values of a pixel where the network reads them.
  T* pixel_values(std::int64_t n, std::int64_t y, std::int64_t x) const { return machine_.at(0, y, n, x); }

  std::int64_t bad() const { return bad_.load(); }  // the first place without finite logits, n * H * W + y * W + x, or -1

 private:
  // Every instruction of a moment whose resolution has a place at (y, x), or a row at y where x is -1.
  void run(const Stages& stages, std::int64_t y, std::int64_t x, const Share& share, Team& team) {
    for (const auto& [begin, end] : stages.ranges) {
      bool ran = false;
      for (const Instruction* i = begin; i < end; ++i) {
        const Buffer& b = program_.buffers[static_cast<std::size_t>(i->output)];
        std::int64_t row = y, first = x, last = x + 1;
        if (b.step > 1) {
          if (y % b.step != 0 || (x >= 0 && x % b.step != 0)) continue;
          row = y / b.step, first = x / b.step, last = first + 1;
        }
        if (x < 0) first = 0, last = b.width;
        if (i->moment == Moment::kBehind) row -= 1;
        if (row < 0 || row >= b.height || last > b.width) continue;
        machine_.run(*i, row, first, last, share);
        ran = true;
      }
      if (ran && share.parts > 1) team.wait();
    }
  }

  void draw_pixel(const Images<T>& io, const Draw& d, std::int64_t n, std::int64_t y, std::int64_t x, std::int64_t first, std::int64_t last) {
    const std::int64_t place = y * program_.width + x, size = program_.height * program_.width, colors = program_.colors;
    const T* const logits = machine_.logits(y, n, x);
    T* const to = pixel_values(n, y, x);
    T log_prob = first == 0 ? T(0) : io.log_prob[n * size + place];
    if (io.logits != nullptr)
      for (std::int64_t o = 0; o < program_.output_channels; ++o)
        if (owner(d, o, first, last)) io.logits[(n * program_.output_channels + o) * size + place] = logits[o];
    const auto pixel = [&](std::int64_t c) { return (n * colors + c) * size + place; };
    if (d.kind == DrawKind::kLogisticMixture) {
      T values[3];
      float u[4];
      bool all = io.known != nullptr, drawn = true;
      for (std::int64_t c = 0; c < colors; ++c) all = all && io.known[pixel(c)];
      for (std::int64_t k = 0; k <= colors; ++k)
        u[k] = uniform(static_cast<std::uint64_t>(io.seeds[n]), d.step, static_cast<std::uint64_t>(place * (colors + 1) + k));
      if (!all) drawn = draw_logistic_mixture<T>(logits, 1, d.count, colors, d.levels, static_cast<T>(d.temperature), u, values);
      for (std::int64_t c = 0; all && c < colors; ++c) values[c] = io.given[pixel(c)];
      if (!drawn) spoil(n * size + place);
      const T found = log_prob_logistic_mixture<T>(logits, 1, d.count, colors, d.levels == 0 ? 256 : d.levels, values);
      if (found != found) spoil(n * size + place);
      log_prob += found;
      for (std::int64_t c = 0; c < colors; ++c) to[c] = io.out[pixel(c)] = values[c];
    } else {
      for (std::int64_t c = first; c < last; ++c) {
        const bool given = io.known != nullptr && io.known[pixel(c)];
        const T* at = logits + c * d.color_stride;
        std::int64_t stride = d.level_stride, count = d.count;
        const T two[] = {T(0), *at};
        if (d.kind == DrawKind::kBernoulli) at = two, stride = 1, count = 2;
        std::int64_t level;
        T found;
        if (given) {
          level = nearest(io, count, io.given[pixel(c)]);
          found = log_prob_categorical<T>(at, stride, count, level);
          if (found != found) spoil(n * size + place);
        } else {
          const float u = uniform(static_cast<std::uint64_t>(io.seeds[n]), d.step, static_cast<std::uint64_t>(place * colors + c));
          level = draw_categorical<T>(at, stride, count, static_cast<T>(d.temperature), d.top_k, static_cast<T>(d.top_p), u, &found);
          if (level < 0) spoil(n * size + place), level = 0, found = T(0);
        }
        log_prob += found;
        to[c] = io.out[pixel(c)] = given ? io.given[pixel(c)] : io.values[level];
      }
    }
    io.log_prob[n * size + place] = log_prob;
  }

  // Whether logit `o` is written in the turn of colors [first, last): of one color each where the colors have turns, the last's too what
  // is no color's.
  bool owner(const Draw& d, std::int64_t o, std::int64_t first, std::int64_t last) const {
    if (!program_.per_color) return true;
    const std::int64_t levels = std::max<std::int64_t>(d.level_stride, 1), colors = std::max<std::int64_t>(d.color_stride, 1);
    const std::int64_t c = std::min(d.color_stride <= d.level_stride ? o % levels / colors : o / colors, program_.colors - 1);
    return c >= first && c < last;
  }

  static std::int64_t nearest(const Images<T>& io, std::int64_t count, T value) {
    std::int64_t best = 0;
    for (std::int64_t k = 1; k < std::min(count, io.levels); ++k)
      if (std::abs(io.values[k] - value) < std::abs(io.values[best] - value)) best = k;
    return best;
  }

  void spoil(std::int64_t place) {
    std::int64_t none = -1;
    bad_.compare_exchange_strong(none, place);
  }

  const Program& program_;
  Machine<T>& machine_;
  const std::int64_t images_;
  const Stages row_, pixel_, after_;
  std::atomic<std::int64_t> bad_{-1};
};

// f(share, team) on as many threads as are worth it.
template <class F>
void in_step(const Program& program, std::int64_t images, const F& f) {
  const auto most = static_cast<std::int64_t>(torch::stable::get_num_threads());
  const std::int64_t threads = program.work * static_cast<double>(images) < kThreadWork ? 1 : std::clamp<std::int64_t>(most, 1, images > 1 ? most : 8);
  Team team(static_cast<int>(threads));
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t place = team.join(static_cast<int>(end - begin));
    if (place < 0) return;
    const std::int64_t members = team.members();
    const bool by_image = images % members == 0 || images >= 4 * members;
    try {
      f(by_image ? Share{place * images / members, (place + 1) * images / members, 0, 1} : Share{0, images, place, members}, team);
    } catch (...) {
      team.fail();
      throw;
    }
  };
  if (threads == 1) part(0, 1);
  else torch::stable::parallel_for(0, threads, 1, part);
}

void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype, std::int64_t dim) {
  FASTGEN_CHECK(t.scalar_type() == dtype && t.dim() == dim && t.is_contiguous(), op, ": ", name, " must be contiguous, of ", dim,
                dim == 1 ? " dimension" : " dimensions", dtype == ScalarType::Long ? " and int64" : " and in the dtype of parameters");
}

// Calls f(weights) with the weights for the type of the arithmetic.
template <class F>
auto dispatch(const char* op, const Tensor& parameters, const Tensor& weights, F&& f) {
  const ScalarType dtype = parameters.scalar_type(), stored = weights.scalar_type();
  FASTGEN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": parameters must be float32 or float64");
  FASTGEN_CHECK(stored == dtype || (dtype == ScalarType::Float && stored == ScalarType::BFloat16), op,
                ": weights must be of the dtype of parameters, or bfloat16 beside float32");
  FASTGEN_CHECK(parameters.dim() == 1 && weights.dim() == 1 && parameters.is_contiguous() && weights.is_contiguous(), op,
                ": parameters and weights must be contiguous vectors");
  const void* const data = weights.data_ptr();
  if (dtype == ScalarType::Double) return f(Weights<double>::of(static_cast<const double*>(data)));
  if (stored == ScalarType::BFloat16) return f(Weights<float>::of(static_cast<const BFloat16*>(data)));
  return f(Weights<float>::of(static_cast<const float*>(data)));
}

void check_constants(const char* op, const std::vector<Tensor>& constants, ScalarType dtype) {
  for (const Tensor& t : constants) check_tensor(op, "constants", t, dtype, 4);
}

std::tuple<Tensor, Tensor, Tensor> incremental_sample(const Tensor& image, OptionalTensor known, const Tensor& program, const Tensor& weights,
                                                      const Tensor& parameters, std::vector<Tensor> constants, const Tensor& levels,
                                                      const Tensor& seeds, std::vector<std::int64_t> draw, double temperature, double top_p,
                                                      std::int64_t channels, bool return_logits) {
  const char* const op = "incremental_sample";
  const ScalarType dtype = parameters.scalar_type();
  return dispatch(op, parameters, weights, [&]<class T>(const Weights<T>& stored) {
    check_tensor(op, "image", image, dtype, 4), check_tensor(op, "levels", levels, dtype, 1), check_tensor(op, "seeds", seeds, ScalarType::Long, 1);
    check_constants(op, constants, dtype);
    const std::int64_t images = image.size(0);
    const Program p(op, program, weights.numel(), parameters.numel(), constants, images);
    FASTGEN_CHECK(channels == p.output_channels, op, ": channels must be the program's ", p.output_channels, ", got ", channels);
    FASTGEN_CHECK(image.size(1) == p.colors && image.size(2) == p.height && image.size(3) == p.width, op, ": image must be [N, ", p.colors, ", ",
                  p.height, ", ", p.width, "], as the program has it");
    FASTGEN_CHECK(seeds.size(0) == images, op, ": seeds must be one an image (", images, "), got ", seeds.size(0));
    if (known.has_value()) {
      FASTGEN_CHECK(known->scalar_type() == ScalarType::Bool && known->is_contiguous() && sizes_of(*known) == sizes_of(image), op,
                    ": known must be bool, contiguous and of the shape of image");
    }
    const Draw d = draw_of(op, p, draw, levels.numel(), temperature, top_p);
    Tensor out = empty_contiguous(sizes_of(image), dtype), log_prob = empty_contiguous({images, p.height, p.width}, dtype);
    Tensor logits = empty_contiguous({return_logits ? images : 0, p.output_channels, p.height, p.width}, dtype);
    Tensor state = empty_contiguous({images * p.state}, dtype);
    std::fill_n(static_cast<T*>(state.mutable_data_ptr()), images * p.state, T(0));
    Machine<T> machine(p, static_cast<T*>(state.mutable_data_ptr()), stored, static_cast<const T*>(parameters.data_ptr()), constants, images);
    Sampler<T> sampler(p, machine, images);
    const Images<T> io{static_cast<const T*>(image.data_ptr()), known.has_value() ? static_cast<const bool*>(known->data_ptr()) : nullptr,
                       static_cast<const T*>(levels.data_ptr()), levels.numel(), static_cast<const std::int64_t*>(seeds.data_ptr()),
                       static_cast<T*>(out.mutable_data_ptr()), static_cast<T*>(log_prob.mutable_data_ptr()),
                       return_logits ? static_cast<T*>(logits.mutable_data_ptr()) : nullptr};
    if (images > 0) in_step(p, images, [&](const Share& share, Team& team) { sampler.sample(io, d, share, team); });
    const std::int64_t bad = sampler.bad(), size = p.height * p.width;
    FASTGEN_CHECK(bad < 0, op, ": the logits of image ", bad / size, " at row ", bad % size / p.width, ", column ", bad % p.width,
                  " are not finite, so no pixel can be drawn of them");
    return std::tuple(out, log_prob, logits);
  });
}

Tensor incremental_step(Tensor state, const Tensor& image, const Tensor& program, const Tensor& weights, const Tensor& parameters,
                        std::vector<Tensor> constants, std::int64_t row, std::int64_t column, std::int64_t color,
                        std::int64_t channels) {
  const char* const op = "incremental_step";
  const ScalarType dtype = parameters.scalar_type();
  return dispatch(op, parameters, weights, [&]<class T>(const Weights<T>& stored) {
    check_tensor(op, "image", image, dtype, 4), check_tensor(op, "state", state, dtype, 1);
    check_constants(op, constants, dtype);
    const std::int64_t images = image.size(0);
    const Program p(op, program, weights.numel(), parameters.numel(), constants, images);
    FASTGEN_CHECK(channels == p.output_channels, op, ": channels must be the program's ", p.output_channels, ", got ", channels);
    FASTGEN_CHECK(image.size(1) == p.colors && image.size(2) == p.height && image.size(3) == p.width, op, ": image must be [N, ", p.colors, ", ",
                  p.height, ", ", p.width, "], as the program has it");
    FASTGEN_CHECK(state.numel() == images * p.state, op, ": state must hold ", images * p.state, " numbers, got ", state.numel());
    FASTGEN_CHECK(row >= 0 && row < p.height && column >= 0 && column < p.width && color >= 0 && color < (p.per_color ? p.colors : 1), op,
                  ": row, column and color must lie in the image, got ", row, ", ", column, ", ", color);
    Machine<T> machine(p, static_cast<T*>(state.mutable_data_ptr()), stored, static_cast<const T*>(parameters.data_ptr()), constants, images);
    Sampler<T> sampler(p, machine, images);
    Tensor logits = empty_contiguous({images, p.output_channels}, dtype);
    const T* const given = static_cast<const T*>(image.data_ptr());
    T* const out = static_cast<T*>(logits.mutable_data_ptr());
    // What was drawn since the last call: the pixel before, or an earlier color of this one.
    const std::int64_t size = p.height * p.width, place = row * p.width + column, before = color > 0 ? place : place - 1;
    if (images > 0)
      in_step(p, images, [&](const Share& share, Team& team) {
        if (before >= 0) {
          for (std::int64_t n = share.first; n < share.last; ++n)
            for (std::int64_t c = 0; share.part == 0 && c < (color > 0 ? color : p.colors); ++c)
              sampler.pixel_values(n, before / p.width, before % p.width)[c] = given[(n * p.colors + c) * size + before];
          if (share.parts > 1) team.wait();
          sampler.after(before / p.width, before % p.width, share, team);
        }
        if (column == 0 && color == 0) sampler.begin_row(row, share, team);
        if (color == 0) sampler.pixel(row, column, share, team);
        if (p.per_color && color == 0) sampler.after(row, column, share, team);
        for (std::int64_t n = share.first; share.part == 0 && n < share.last; ++n)
          std::copy_n(machine.logits(row, n, column), p.output_channels, out + n * p.output_channels);
      });
    return logits;
  });
}

}  // namespace
}  // namespace fastgen::incremental

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("incremental_sample", TORCH_BOX(&fastgen::incremental::incremental_sample));
  m.impl("incremental_step", TORCH_BOX(&fastgen::incremental::incremental_step));
}
