#include "kernels/cpu/gemm_onednn.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <new>
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/memory.h"

namespace headstart {
namespace {

// Longer products run in slices, so that only the rest of a new prompt length needs a new
// primitive.
constexpr int64_t kSliceRows = 1024;
// Primitives kept; then all are dropped. A model needs about five per number of rows.
constexpr size_t kMaxPrimitives = 512;

dnnl::memory::data_type DnnlType(DType dtype) {
  return dtype == DType::kF32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

dnnl::memory::desc RowMajor(int64_t rows, int64_t cols, DType dtype) {
  return {{rows, cols}, DnnlType(dtype), dnnl::memory::dims{cols, 1}};
}

bool IsDense(const Matrix& m) { return m.rows == 1 || m.row_stride == m.cols; }

void CopyRows(const Matrix& from, const Matrix& to) {
  for (int64_t r = 0; r < from.rows; ++r) {
    std::memcpy(to.Rows(r, 1).data, from.Rows(r, 1).data, from.cols * DTypeBytes(from.dtype));
  }
}

// Keeps oneDNN to the level that our own kernels run on.
void LimitDnnlIsa(CpuIsa isa) {
  if (isa == CpuIsa::kAvx512Bf16) return;
  const auto limit = isa == CpuIsa::kGeneric ? dnnl::cpu_isa::sse41
                     : isa == CpuIsa::kAvx2  ? dnnl::cpu_isa::avx2
                                             : dnnl::cpu_isa::avx512_core;
  // Refused once oneDNN has run in this process; then the earlier limit holds.
  static_cast<void>(dnnl::set_max_cpu_isa(limit));
}

// Runs `body`, which may throw, and turns what it throws into a status.
template <typename Body>
absl::Status CatchDnnl(const Body& body) {
  try {
    body();
    return absl::OkStatus();
  } catch (const dnnl::error& error) {
    if (error.status == dnnl_out_of_memory) {
      return absl::ResourceExhaustedError(absl::StrCat("oneDNN: ", error.what()));
    }
    return absl::InternalError(absl::StrCat("oneDNN: ", error.what()));
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of host memory in a matrix product");
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat("matrix product: ", error.what()));
  }
}

class DnnlWeight : public LinearWeight {
 public:
  DnnlWeight(int64_t in_features, int64_t out_features, dnnl::memory::desc desc, HostMemory data,
             HostMemory bias)
      : LinearWeight(in_features, out_features),
        desc(std::move(desc)),
        data(std::move(data)),
        bias(std::move(bias)) {}

  const dnnl::memory::desc desc;
  const HostMemory data;
  const HostMemory bias;  // f32, or null
};

// What a primitive is made for.
struct Shape {
  int64_t rows, in, out;
  DType out_dtype;
  bool bias;
  LinearOutput mode;

  auto Key() const { return std::tie(rows, in, out, out_dtype, bias, mode); }
  friend bool operator<(const Shape& a, const Shape& b) { return a.Key() < b.Key(); }
};

struct Primitive {
  dnnl::matmul matmul;
  dnnl::memory::desc in, out, bias, scratchpad;
};

dnnl::matmul::primitive_desc Describe(const dnnl::engine& engine, const Shape& shape, DType compute,
                                      const dnnl::memory::desc& weight) {
  dnnl::primitive_attr attr;
  // Our own scratchpad: the library's belongs to the thread that made the primitive.
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (shape.mode == LinearOutput::kAdd) {
    dnnl::post_ops add;
    add.append_sum(1.0f);
    attr.set_post_ops(add);
  }
  const auto in = RowMajor(shape.rows, shape.in, compute);
  const auto out = RowMajor(shape.rows, shape.out, shape.out_dtype);
  const auto bias = shape.bias ? RowMajor(1, shape.out, DType::kF32) : dnnl::memory::desc();
#if DNNL_VERSION_MAJOR >= 3
  return dnnl::matmul::primitive_desc(engine, in, weight, bias, out, attr);
#else
  return dnnl::matmul::primitive_desc(dnnl::matmul::desc(in, weight, bias, out), attr, engine);
#endif
}

absl::Status CheckParts(absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) {
  if (parts.empty()) return absl::InvalidArgumentError("a linear layer needs at least one weight");
  if (!biases.empty() && biases.size() != parts.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("got ", biases.size(), " biases for ", parts.size(), " weights"));
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].cols != parts[0].cols || parts[i].rows <= 0 || parts[i].cols <= 0) {
      return absl::InvalidArgumentError(absl::StrCat("weight part ", i, " is [", parts[i].rows,
                                                     ", ", parts[i].cols, "], the first has ",
                                                     parts[0].cols, " columns"));
    }
    if (!biases.empty() && biases[i].rows * biases[i].cols != parts[i].rows) {
      return absl::InvalidArgumentError(
          absl::StrCat("bias ", i, " has ", biases[i].rows * biases[i].cols,
                       " values, its weight has ", parts[i].rows, " rows"));
    }
  }
  return absl::OkStatus();
}

// The tensors one after the other, as `dtype`.
absl::StatusOr<HostMemory> Concatenate(absl::Span<const HostTensor> parts, DType dtype,
                                       int32_t num_threads) {
  int64_t count = 0;
  for (const HostTensor& part : parts) count += part.rows * part.cols;
  HEADSTART_ASSIGN_OR_RETURN(HostMemory memory, AllocateHostMemory(count * DTypeBytes(dtype)));
  char* out = memory.get();
  for (const HostTensor& part : parts) {
    const int64_t elements = part.rows * part.cols;
    ConvertElements(part.data, part.dtype, elements, out, dtype, num_threads);
    out += elements * DTypeBytes(dtype);
  }
  return memory;
}

}  // namespace

struct OneDnnGemm::State {
  DType dtype;
  int32_t num_threads;
  dnnl::engine engine;
  dnnl::stream stream;
  std::map<Shape, Primitive> primitives;
  Scratch scratchpad;
  Scratch in_copy;
  Scratch out_copy;

  // oneDNN takes the number of threads from OpenMP's setting for the calling thread.
  void UseThreads() const { omp_set_num_threads(num_threads); }

  Primitive& Find(const Shape& shape, const DnnlWeight& weight) {
    auto found = primitives.find(shape);
    if (found != primitives.end()) return found->second;
    if (primitives.size() >= kMaxPrimitives) primitives.clear();
    const auto described = Describe(engine, shape, dtype, weight.desc);
    Primitive primitive{dnnl::matmul(described), described.src_desc(), described.dst_desc(),
                        described.bias_desc(), described.scratchpad_desc()};
    return primitives.emplace(shape, std::move(primitive)).first->second;
  }

  // in, out: dense.
  absl::Status Run(const DnnlWeight& weight, Matrix in, Matrix out, LinearOutput mode) {
    const Shape shape{in.rows,   weight.in_features(),   weight.out_features(),
                      out.dtype, weight.bias != nullptr, mode};
    Primitive& primitive = Find(shape, weight);
    HEADSTART_ASSIGN_OR_RETURN(
        char* const scratch, scratchpad.Get(static_cast<int64_t>(primitive.scratchpad.get_size())));
    std::unordered_map<int, dnnl::memory> args = {
        {DNNL_ARG_SRC, {primitive.in, engine, in.data}},
        {DNNL_ARG_WEIGHTS, {weight.desc, engine, weight.data.get()}},
        {DNNL_ARG_DST, {primitive.out, engine, out.data}},
        {DNNL_ARG_SCRATCHPAD, {primitive.scratchpad, engine, scratch}}};
    if (shape.bias) {
      args.emplace(DNNL_ARG_BIAS, dnnl::memory(primitive.bias, engine, weight.bias.get()));
    }
    primitive.matmul.execute(stream, args);
    stream.wait();
    return absl::OkStatus();
  }

  static absl::StatusOr<Matrix> DenseLike(const Matrix& m, Scratch& scratch) {
    HEADSTART_ASSIGN_OR_RETURN(char* const data,
                               scratch.Get(m.rows * m.cols * DTypeBytes(m.dtype)));
    return Matrix{data, m.dtype, m.rows, m.cols, m.cols};
  }

  // Copies what has gaps between its rows: on such matrices oneDNN 2.6 leaves its fast path, and
  // for bf16 with reordered weights there is none but a scalar loop.
  absl::Status RunDense(const DnnlWeight& weight, Matrix in, Matrix out, LinearOutput mode) {
    Matrix dense_in = in;
    if (!IsDense(in)) {
      HEADSTART_ASSIGN_OR_RETURN(dense_in, DenseLike(in, in_copy));
      CopyRows(in, dense_in);
    }
    if (IsDense(out)) return Run(weight, dense_in, out, mode);
    HEADSTART_ASSIGN_OR_RETURN(const Matrix dense_out, DenseLike(out, out_copy));
    if (mode == LinearOutput::kAdd) CopyRows(out, dense_out);
    HEADSTART_RETURN_IF_ERROR(Run(weight, dense_in, dense_out, mode));
    CopyRows(dense_out, out);
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<LinearWeight>> Reorder(int64_t in, int64_t out,
                                                        const HostMemory& plain, HostMemory bias) {
    // The layout that oneDNN wants for full slices; it serves every other number of rows as well.
    const dnnl::memory::desc any({in, out}, DnnlType(dtype), dnnl::memory::format_tag::any);
    const Shape shape{kSliceRows, in, out, dtype, bias != nullptr, LinearOutput::kStore};
    const dnnl::memory::desc desc = Describe(engine, shape, dtype, any).weights_desc();
    HEADSTART_ASSIGN_OR_RETURN(HostMemory data,
                               AllocateHostMemory(static_cast<int64_t>(desc.get_size())));
    dnnl::memory from({{in, out}, DnnlType(dtype), dnnl::memory::dims{1, in}}, engine, plain.get());
    dnnl::memory to(desc, engine, data.get());
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
    return std::make_unique<DnnlWeight>(in, out, desc, std::move(data), std::move(bias));
  }
};

OneDnnGemm::OneDnnGemm(std::unique_ptr<State> state) : state_(std::move(state)) {}
OneDnnGemm::~OneDnnGemm() = default;

absl::StatusOr<std::unique_ptr<OneDnnGemm>> OneDnnGemm::Create(CpuIsa isa, DType compute_dtype,
                                                               int32_t num_threads) {
  std::unique_ptr<State> state;
  HEADSTART_RETURN_IF_ERROR(CatchDnnl([&] {
    LimitDnnlIsa(isa);
    const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    state = std::make_unique<State>(
        State{compute_dtype, num_threads, engine, dnnl::stream(engine), {}, {}, {}, {}});
  }));
  return std::unique_ptr<OneDnnGemm>(new OneDnnGemm(std::move(state)));
}

absl::StatusOr<std::unique_ptr<LinearWeight>> OneDnnGemm::Prepare(
    absl::Span<const HostTensor> parts, absl::Span<const HostTensor> biases) {
  HEADSTART_RETURN_IF_ERROR(CheckParts(parts, biases));
  State& s = *state_;
  s.UseThreads();
  HEADSTART_ASSIGN_OR_RETURN(HostMemory plain, Concatenate(parts, s.dtype, s.num_threads));
  HostMemory bias;
  if (!biases.empty()) {
    HEADSTART_ASSIGN_OR_RETURN(bias, Concatenate(biases, DType::kF32, s.num_threads));
  }
  int64_t out = 0;
  for (const HostTensor& part : parts) out += part.rows;
  absl::StatusOr<std::unique_ptr<LinearWeight>> weight = nullptr;
  HEADSTART_RETURN_IF_ERROR(
      CatchDnnl([&] { weight = s.Reorder(parts[0].cols, out, plain, std::move(bias)); }));
  return weight;
}

absl::Status OneDnnGemm::Multiply(const LinearWeight& weight, Matrix in, Matrix out,
                                  LinearOutput mode) {
  State& s = *state_;
  s.UseThreads();
  const auto& prepared = static_cast<const DnnlWeight&>(weight);
  absl::Status status;
  HEADSTART_RETURN_IF_ERROR(CatchDnnl([&] {
    for (int64_t row = 0; row < in.rows && status.ok(); row += kSliceRows) {
      const int64_t rows = std::min(kSliceRows, in.rows - row);
      status = s.RunDense(prepared, in.Rows(row, rows), out.Rows(row, rows), mode);
    }
  }));
  return status;
}

}  // namespace headstart
