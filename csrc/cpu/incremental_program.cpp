// Reading and checking of programs; see incremental_program.h.
#include "incremental_program.h"

namespace fastgen::incremental {

// The numbers of a program, one after the other, none past its end.
class Program::Reader {
 public:
  Reader(const char* op, const Tensor& program)
      : op_(op), at_(static_cast<const std::int64_t*>(program.data_ptr())), end_(at_ + program.numel()) {}

  std::int64_t operator()() {
    FASTGEN_CHECK(at_ < end_, op_, ": program ends before its last record does");
    return *at_++;
  }
  // A number that counts or indexes something, in [low, high].
  std::int64_t operator()(const char* what, std::int64_t low, std::int64_t high) {
    const std::int64_t value = (*this)();
    FASTGEN_CHECK(value >= low && value <= high, op_, ": program has ", what, " = ", value, ", which must be in [", low, ", ", high, "]");
    return value;
  }
  const std::int64_t* position() const { return at_; }
  std::int64_t left() const { return end_ - at_; }

 private:
  const char* op_;
  const std::int64_t *at_, *end_;
};

namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 31;       // of any size in a program: products of two do not overflow
constexpr std::int64_t kMostState = std::int64_t{1} << 40;  // numbers of state of all images

}  // namespace

Program::Program(const char* op, const Tensor& program, std::int64_t weights, std::int64_t parameters, const std::vector<Tensor>& constants,
                 std::int64_t images) {
  FASTGEN_CHECK(program.scalar_type() == ScalarType::Long && program.dim() == 1 && program.is_contiguous(), op,
                ": program must be a contiguous int64 vector");
  Reader in(op, program);
  height = in("height", 1, kMost), width = in("width", 1, kMost), colors = in("colors", 1, kMost);
  // A buffer or a record takes some numbers, so there are not more of them than numbers left.
  const std::int64_t buffer_count = in("buffers", 1, kMost), count = in("instructions", 0, in.left());
  state = in("state", 0, kMostState / std::max<std::int64_t>(images, 1));
  output = {in("output", 0, buffer_count - 1), in("output_start", 0, kMost), 0, 0};
  output_channels = in("output_channels", 1, kMost);
  per_color = in("per_color", 0, 1) == 1;
  for (std::int64_t b = 0; b < buffer_count; ++b) {
    Buffer buffer{};
    buffer.constant = in("constant", -1, static_cast<std::int64_t>(constants.size()) - 1);
    buffer.channels = in("channels", 1, kMost), buffer.height = in("height", 1, kMost), buffer.width = in("width", 1, kMost);
    buffer.rows = in("rows", 1, kMost), buffer.left = in("left", 0, kMost), buffer.right = in("right", 0, kMost);
    buffer.offset = in("offset", 0, state), buffer.step = in("step", 1, kMost);
    FASTGEN_CHECK((buffer.rows & (buffer.rows - 1)) == 0, op, ": program keeps ", buffer.rows, " rows, which must be a power of two");
    if (buffer.constant >= 0) {  // [1 or N, 1 or H, 1 or W, C]
      const Tensor& t = constants[static_cast<std::size_t>(buffer.constant)];
      FASTGEN_CHECK(t.dim() == 4 && t.is_contiguous() && (t.size(0) == 1 || t.size(0) == images) && t.size(1) == buffer.height &&
                        t.size(2) == buffer.width && t.size(3) == buffer.channels,
                    op, ": constants[", buffer.constant, "] must be contiguous [1 or ", images, ", ", buffer.height, ", ", buffer.width, ", ",
                    buffer.channels, "]");
    } else {
      FASTGEN_CHECK(static_cast<double>(buffer.rows) * static_cast<double>(buffer.columns()) * static_cast<double>(buffer.channels) +
                            static_cast<double>(buffer.offset) <= static_cast<double>(state),
                    op, ": program has a buffer that lies past the state of ", state, " numbers");
    }
    buffers.push_back(buffer);
  }
  const Buffer& image = buffers[0];
  FASTGEN_CHECK(image.constant < 0 && image.channels == colors && image.height == height && image.width == width && image.step == 1, op,
                ": program's first buffer must be the image, ", colors, " x ", height, " x ", width);
  instructions.reserve(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t* const begin = in.position();
    const std::int64_t length = in("length", 5, in.left());
    read_instruction(in);
    FASTGEN_CHECK(in.position() - begin == length, op, ": program has a record of ", in.position() - begin, " numbers where its length says ",
                  length);
    check(op, instructions.back(), weights, parameters);
    if (run_at(instructions.back()) != Moment::kRow)
      for (const Phase& phase : instructions.back().phases)
        work += static_cast<double>(phase.total) * static_cast<double>(buffers[static_cast<std::size_t>(instructions.back().output)].channels);
  }
  FASTGEN_CHECK(in.left() == 0, op, ": program goes on after its last record");
  const Buffer& logits = buffers[static_cast<std::size_t>(output.buffer)];
  FASTGEN_CHECK(logits.constant < 0 && output.start + output_channels <= logits.channels && logits.height == height && logits.width == width, op,
                ": program's output must lie in a buffer of the size of the image");
  std::stable_sort(instructions.begin(), instructions.end(), [](const Instruction& a, const Instruction& b) {
    return std::pair(run_at(a), a.stage) < std::pair(run_at(b), b.stage);
  });
}

void Program::read_instruction(Reader& in) {
  const auto last_buffer = static_cast<std::int64_t>(buffers.size()) - 1;
  const auto operand = [&] {
    const std::int64_t buffer = in("buffer", 0, last_buffer), start = in("start", 0, kMost);
    return Operand{buffer, start, in("dy", -kMost, kMost), in("dx", -kMost, kMost)};
  };
  const auto activation = [&] { return static_cast<Activation>(in("activation", 0, kActivations - 1)); };
  Instruction i{};
  i.kind = static_cast<Kind>(in("kind", 0, 5)), i.moment = static_cast<Moment>(in("moment", 0, 3));
  i.stage = in("stage", 0, kMost), i.output = in("output", 0, last_buffer);
  switch (i.kind) {
    case Kind::kCombine: {
      i.activation = activation(), i.bias = in("bias", -1, kMost), i.upscale = in("upscale", 1, 64);
      for (std::int64_t p = 0; p < i.upscale * i.upscale; ++p) {
        Phase phase{in("total", 0, kMost), in("weights", 0, std::int64_t{1} << 40), {}};
        for (std::int64_t s = in("segments", 0, kMost); s > 0; --s) {
          const Operand source = operand();
          const std::int64_t run = in("length", 1, kMost);
          phase.segments.push_back({source, run, in("stride", 1, 64)});
        }
        i.phases.push_back(phase);
      }
      for (std::int64_t a = in("addends", 0, kMost); a > 0; --a) {
        const Operand source = operand();
        i.addends.push_back({source, in("scale", -1, kMost)});
      }
      break;
    }
    case Kind::kProduct:
      i.activation = activation(), i.gate = activation();
      for (int k = 0; k < 2; ++k) i.parts.push_back({operand(), buffers[static_cast<std::size_t>(i.output)].channels, -1});
      break;
    case Kind::kConcat:
      i.activation = activation();
      for (std::int64_t p = in("parts", 1, kMost); p > 0; --p) {
        const Operand source = operand();
        const std::int64_t channels = in("channels", 1, kMost);
        i.parts.push_back({source, channels, in("scale", -1, kMost)});
      }
      break;
    case Kind::kLayerNorm:
      i.parts.push_back({operand(), buffers[static_cast<std::size_t>(i.output)].channels, -1});
      i.weight = in("weight", -1, kMost), i.bias = in("bias", -1, kMost), i.eps = in("eps", 0, kMost);
      break;
    case Kind::kAttention:
      for (int k = 0; k < 3; ++k) {
        const Operand source = operand();
        i.parts.push_back({source, in("channels", 1, kMost), -1});
      }
      i.heads = in("heads", 1, kMost), i.scale = in("scale", 0, kMost), i.strict = in("strict", 0, 1);
      break;
    case Kind::kEmbedding: {
      const Operand source = operand();
      i.parts.push_back({source, in("channels", 1, kMost), -1});
      i.table = in("table", 0, kMost), i.levels = in("levels", 1, kMost), i.width = in("width", 1, kMost);
      break;
    }
  }
  instructions.push_back(std::move(i));
}

void Program::check_operand(const char* op, const Instruction& i, const Operand& o, std::int64_t channels) const {
  const Buffer &from = buffers[static_cast<std::size_t>(o.buffer)], &to = buffers[static_cast<std::size_t>(i.output)];
  FASTGEN_CHECK(o.start + channels <= from.channels, op, ": program reads channels ", o.start, " to ", o.start + channels, " of a buffer of ",
                from.channels);
  if (from.constant >= 0) {
    FASTGEN_CHECK(o.dy == 0 && o.dx == 0 && (from.height == 1 || from.height >= to.height) && (from.width == 1 || from.width >= to.width), op,
                  ": program reads past a constant");
  } else {
    FASTGEN_CHECK(o.dx + from.left >= 0 && to.width + o.dx <= from.width + from.right && from.step == to.step, op,
                  ": program reads columns past a buffer");
  }
}

void Program::check(const char* op, const Instruction& i, std::int64_t weights, std::int64_t parameters) const {
  const Buffer& to = buffers[static_cast<std::size_t>(i.output)];
  const auto fits = [&](std::int64_t first, std::int64_t count) {
    FASTGEN_CHECK(first == -1 || first + count <= parameters, op, ": program reads past its ", parameters, " parameters");
  };
  FASTGEN_CHECK(to.constant < 0 && i.output != 0, op, ": program writes to a constant, or to the image");
  switch (i.kind) {
    case Kind::kCombine: {
      fits(i.bias, to.channels);
      const std::int64_t panels = (to.channels + kPanelOutputs - 1) / kPanelOutputs;
      for (const Phase& phase : i.phases) {
        std::int64_t total = 0;
        for (const Segment& s : phase.segments) {
          const Buffer& from = buffers[static_cast<std::size_t>(s.source.buffer)];
          const std::int64_t last = s.stride * ((to.width - 1) / i.upscale) + s.source.dx;  // the last column that is read from
          total += s.length;
          FASTGEN_CHECK(from.constant < 0 && from.step * s.stride == to.step * i.upscale, op, ": program has a product of another resolution");
          FASTGEN_CHECK(s.source.dx + from.left >= 0 && last + from.left < from.columns() && (last + from.left) * from.channels + s.source.start + s.length <= from.columns() * from.channels,
                        op, ": program has a product that reads past a row");
        }
        FASTGEN_CHECK(total == phase.total && phase.weights + panels * total * kPanelOutputs <= weights, op,
                      ": program reads past its ", weights, " weights");
      }
      for (const Addend& a : i.addends) fits(a.scale, 1), check_operand(op, i, a.source, to.channels);
      break;
    }
    case Kind::kProduct:
      for (const Part& part : i.parts) check_operand(op, i, part.source, to.channels);
      break;
    case Kind::kConcat: {
      std::int64_t total = 0;
      for (const Part& part : i.parts) total += part.channels, fits(part.scale, 1), check_operand(op, i, part.source, part.channels);
      FASTGEN_CHECK(total == to.channels, op, ": program has a concatenation of ", total, " channels in a buffer of ", to.channels);
      break;
    }
    case Kind::kLayerNorm:
      fits(i.weight, to.channels), fits(i.bias, to.channels), fits(i.eps, 1);
      check_operand(op, i, i.parts[0].source, to.channels);
      break;
    case Kind::kAttention: {
      fits(i.scale, 1);
      for (const Part& part : i.parts) {
        check_operand(op, i, part.source, part.channels);
        FASTGEN_CHECK(part.channels % i.heads == 0 && part.source.dy == 0 && part.source.dx == 0, op,
                      ": program has an attention of ", i.heads, " heads over ", part.channels, " channels, or a shifted one");
      }
      FASTGEN_CHECK(i.parts[0].channels == i.parts[1].channels && i.parts[2].channels == to.channels, op,
                    ": program has an attention of channels that do not fit");
      for (std::size_t k = 0; k < 3; ++k) {  // the query's own row is the newest
        const Buffer& from = buffers[static_cast<std::size_t>(i.parts[k].source.buffer)];
        if (from.constant >= 0) continue;
        FASTGEN_CHECK(k == 0 || from.rows >= to.height, op, ": program has an attention over rows that are not kept");
        FASTGEN_CHECK(from.height >= to.height && from.width >= to.width, op, ": program has an attention over a smaller image");
      }
      break;
    }
    case Kind::kEmbedding:
      fits(i.table, i.levels * i.width), check_operand(op, i, i.parts[0].source, i.parts[0].channels);
      FASTGEN_CHECK(i.parts[0].channels * i.width == to.channels, op, ": program has an embedding of ", i.width, " x ", i.parts[0].channels,
                    " channels in a buffer of ", to.channels);
      break;
  }
}

}  // namespace fastgen::incremental
