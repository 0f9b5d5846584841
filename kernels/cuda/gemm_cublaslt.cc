#include "kernels/cuda/gemm_cublaslt.h"

#include <bit>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/launchers.h"

namespace headstart::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr int kMaxCandidates = 8;
constexpr int kTrialRuns = 3;
constexpr int64_t kMeasuredRows = 2048;  // for which the library proposes the measure
constexpr int64_t kComparedRows = 128;   // enough for another order of sums to show

absl::Status ToStatus(cublasStatus_t status, absl::string_view what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string message = absl::StrCat("cuBLASLt, ", what, ": ", cublasLtGetStatusName(status));
  return status == CUBLAS_STATUS_ALLOC_FAILED ? absl::ResourceExhaustedError(message)
                                              : absl::InternalError(message);
}

using MatmulDesc =
    std::unique_ptr<cublasLtMatmulDescOpaque_t, Destroyer<cublasLtMatmulDescDestroy>>;
using MatrixLayout =
    std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Destroyer<cublasLtMatrixLayoutDestroy>>;
using Preference =
    std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, Destroyer<cublasLtMatmulPreferenceDestroy>>;

absl::StatusOr<MatrixLayout> MakeLayout(cudaDataType_t type, int64_t rows, int64_t cols,
                                        int64_t leading) {
  cublasLtMatrixLayout_t layout = nullptr;
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cublasLtMatrixLayoutCreate(&layout, type, rows, cols, leading), "layout"));
  return MatrixLayout(layout);
}

template <typename T>
absl::Status SetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                          const T& value) {
  return ToStatus(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof(value)),
                  "descriptor");
}

template <typename T>
absl::Status SetPreference(cublasLtMatmulPreference_t preference,
                           cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  return ToStatus(
      cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
      "preference");
}

cudaDataType_t DataType(DType dtype) { return dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

int64_t BytesOf(const Matrix& m) { return m.rows * m.row_stride * DTypeBytes(m.dtype); }

// Memory like that of `m`, with values in [-1, 1), always the same ones.
absl::StatusOr<DeviceMemory> RandomLike(const Matrix& m, cudaStream_t stream) {
  std::vector<char> values(static_cast<size_t>(BytesOf(m)));
  uint32_t state = 1;
  for (int64_t i = 0; i < m.rows * m.row_stride; ++i) {
    state = state * 1664525u + 1013904223u;  // Numerical Recipes
    const float value = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
    const BFloat16 rounded(value);
    const void* const from = m.dtype == DType::kF32 ? static_cast<const void*>(&value) : &rounded;
    std::memcpy(values.data() + i * DTypeBytes(m.dtype), from, DTypeBytes(m.dtype));
  }
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory memory, AllocateDevice(BytesOf(m)));
  HEADSTART_RETURN_IF_ERROR(cuda::ToStatus(
      cudaMemcpyAsync(memory.get(), values.data(), values.size(), cudaMemcpyHostToDevice, stream),
      "input of a trial product"));
  HEADSTART_RETURN_IF_ERROR(
      cuda::ToStatus(cudaStreamSynchronize(stream), "input of a trial product"));
  return memory;
}

// Memory for the rows of `m`, zeros between them.
absl::StatusOr<DeviceMemory> ZerosLike(const Matrix& m, cudaStream_t stream) {
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory memory, AllocateDevice(BytesOf(m)));
  HEADSTART_RETURN_IF_ERROR(
      cuda::ToStatus(cudaMemsetAsync(memory.get(), 0, static_cast<size_t>(BytesOf(m)), stream),
                     "output of a trial product"));
  return memory;
}

}  // namespace

// One product in cuBLAS's column-major terms: row-major out [n, m] is D [m, n] = W^T x, W [k, m]
// and x [k, n] as stored.
struct CublasLtGemm::Problem {
  MatmulDesc desc;
  MatrixLayout weight_layout, in_layout, out_layout;
  const CudaLinearWeight* weight;
  Matrix in, out;
  LinearOutput mode;

  float beta() const { return mode == LinearOutput::kAdd ? 1.0f : 0.0f; }

  static absl::StatusOr<Problem> Make(const CudaLinearWeight& weight, const Matrix& in,
                                      const Matrix& out, LinearOutput mode) {
    Problem problem{};
    cublasLtMatmulDesc_t desc = nullptr;
    HEADSTART_RETURN_IF_ERROR(
        ToStatus(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor"));
    problem.desc.reset(desc);
    HEADSTART_RETURN_IF_ERROR(SetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T));
    const void* const bias = weight.bias(out.dtype);
    if (bias != nullptr) {
      HEADSTART_RETURN_IF_ERROR(
          SetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS));
      HEADSTART_RETURN_IF_ERROR(SetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias));
    }
    const int64_t m = weight.out_features(), n = in.rows, k = weight.in_features();
    HEADSTART_ASSIGN_OR_RETURN(problem.weight_layout, MakeLayout(CUDA_R_16BF, k, m, k));
    HEADSTART_ASSIGN_OR_RETURN(problem.in_layout, MakeLayout(CUDA_R_16BF, k, n, in.row_stride));
    HEADSTART_ASSIGN_OR_RETURN(problem.out_layout,
                               MakeLayout(DataType(out.dtype), m, n, out.row_stride));
    problem.weight = &weight;
    problem.in = in;
    problem.out = out;
    problem.mode = mode;
    return problem;
  }

  // The same kind of product, without data.
  absl::StatusOr<Problem> WithRows(int64_t rows) const {
    Matrix other_in = in, other_out = out;
    other_in.rows = other_out.rows = rows;
    other_in.data = other_out.data = nullptr;
    return Make(*weight, other_in, other_out, mode);
  }
};

// A product of its own with what the measure makes of it. The real one may be of one row, or of
// equal rows, which would tell nothing.
struct CublasLtGemm::Comparison {
  Problem problem;
  DeviceMemory in, before;  // `before`: what the product is added to
  DeviceMemory expected, target;
};

absl::StatusOr<std::unique_ptr<CublasLtGemm>> CublasLtGemm::Create(bool fastest) {
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory workspace, AllocateDevice(kWorkspaceBytes));
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory differs, AllocateDevice(sizeof(uint32_t)));
  HEADSTART_ASSIGN_OR_RETURN(Event begin, MakeEvent(kTimedEvent));
  HEADSTART_ASSIGN_OR_RETURN(Event end, MakeEvent(kTimedEvent));
  cublasLtHandle_t handle = nullptr;
  HEADSTART_RETURN_IF_ERROR(ToStatus(cublasLtCreate(&handle), "start"));
  return std::unique_ptr<CublasLtGemm>(new CublasLtGemm(
      handle, fastest, std::move(workspace), std::move(differs), std::move(begin), std::move(end)));
}

CublasLtGemm::CublasLtGemm(cublasLtHandle_t handle, bool fastest, DeviceMemory workspace,
                           DeviceMemory differs, Event begin, Event end)
    : handle_(handle),
      fastest_(fastest),
      workspace_(std::move(workspace)),
      differs_(std::move(differs)),
      begin_(std::move(begin)),
      end_(std::move(end)) {}

CublasLtGemm::~CublasLtGemm() { cublasLtDestroy(handle_); }

absl::Status CublasLtGemm::Run(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm,
                               void* target, cudaStream_t stream) {
  const float alpha = 1.0f, beta = problem.beta();
  return ToStatus(
      cublasLtMatmul(handle_, problem.desc.get(), &alpha, problem.weight->weight(),
                     problem.weight_layout.get(), problem.in.data, problem.in_layout.get(), &beta,
                     problem.out.data, problem.out_layout.get(), target, problem.out_layout.get(),
                     &algorithm, workspace_.get(), kWorkspaceBytes, stream),
      "product");
}

absl::StatusOr<CublasLtGemm::Algorithms> CublasLtGemm::Candidates(const Problem& problem) {
  cublasLtMatmulPreference_t raw = nullptr;
  HEADSTART_RETURN_IF_ERROR(ToStatus(cublasLtMatmulPreferenceCreate(&raw), "preference"));
  const Preference preference(raw);
  HEADSTART_RETURN_IF_ERROR(
      SetPreference(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes));
  const uint32_t schemes =
      fastest_ ? CUBLASLT_REDUCTION_SCHEME_MASK : CUBLASLT_REDUCTION_SCHEME_NONE;
  HEADSTART_RETURN_IF_ERROR(
      SetPreference(raw, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes));
  std::vector<cublasLtMatmulHeuristicResult_t> results(kMaxCandidates);
  const std::string what = absl::StrCat("algorithm for [", problem.in.rows, ", ", problem.in.cols,
                                        "] x [", problem.in.cols, ", ", problem.out.cols, "]");
  int found = 0;
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cublasLtMatmulAlgoGetHeuristic(handle_, problem.desc.get(),
                                              problem.weight_layout.get(), problem.in_layout.get(),
                                              problem.out_layout.get(), problem.out_layout.get(),
                                              raw, kMaxCandidates, results.data(), &found),
               what));
  Algorithms algorithms;
  for (int i = 0; i < found; ++i) {
    if (results[i].state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(results[i].algo);
  }
  if (algorithms.empty()) return absl::InternalError(absl::StrCat("cuBLASLt knows no ", what));
  return algorithms;
}

bool CublasLtGemm::Takes(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm) {
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t usable = cublasLtMatmulAlgoCheck(
      handle_, problem.desc.get(), problem.weight_layout.get(), problem.in_layout.get(),
      problem.out_layout.get(), problem.out_layout.get(), &algorithm, &result);
  return usable == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kWorkspaceBytes;
}

CublasLtGemm::Kind CublasLtGemm::KindOf(const Problem& problem) {
  const CudaLinearWeight& weight = *problem.weight;
  return {weight.out_features(),
          weight.in_features(),
          static_cast<int>(problem.out.dtype),
          static_cast<int>(problem.mode),
          weight.bias(problem.out.dtype) != nullptr,
          problem.in.row_stride,
          problem.out.row_stride};
}

absl::StatusOr<cublasLtMatmulAlgo_t> CublasLtGemm::MeasureOf(const Problem& problem) {
  const Kind kind = KindOf(problem);
  auto found = measures_.find(kind);
  if (found == measures_.end()) {
    HEADSTART_ASSIGN_OR_RETURN(const Problem measured, problem.WithRows(kMeasuredRows));
    HEADSTART_ASSIGN_OR_RETURN(const Algorithms candidates, Candidates(measured));
    found = measures_.emplace(kind, candidates[0]).first;
  }
  if (Takes(problem, found->second)) return found->second;
  return absl::InternalError(absl::StrCat("cuBLASLt's algorithm for products [*, ", problem.in.cols,
                                          "] x [", problem.in.cols, ", ", problem.out.cols,
                                          "] does not take ", problem.in.rows,
                                          " rows; with fastest_products another one is taken"));
}

absl::StatusOr<CublasLtGemm::Comparison> CublasLtGemm::Compare(const Problem& problem,
                                                               const cublasLtMatmulAlgo_t& measure,
                                                               cudaStream_t stream) {
  HEADSTART_ASSIGN_OR_RETURN(Problem compared, problem.WithRows(kComparedRows));
  Comparison comparison{std::move(compared), nullptr, nullptr, nullptr, nullptr};
  Problem& p = comparison.problem;
  HEADSTART_ASSIGN_OR_RETURN(comparison.in, RandomLike(p.in, stream));
  HEADSTART_ASSIGN_OR_RETURN(comparison.expected, ZerosLike(p.out, stream));
  HEADSTART_ASSIGN_OR_RETURN(comparison.target, ZerosLike(p.out, stream));
  if (p.mode == LinearOutput::kAdd) {
    HEADSTART_ASSIGN_OR_RETURN(comparison.before, RandomLike(p.out, stream));
  }
  p.in.data = comparison.in.get();
  p.out.data = comparison.before != nullptr ? comparison.before.get() : comparison.target.get();
  HEADSTART_RETURN_IF_ERROR(Run(p, measure, comparison.expected.get(), stream));
  return comparison;
}

absl::StatusOr<bool> CublasLtGemm::GivesSameBits(const Comparison& comparison,
                                                 const cublasLtMatmulAlgo_t& algorithm,
                                                 cudaStream_t stream) {
  if (!Takes(comparison.problem, algorithm)) return false;
  HEADSTART_RETURN_IF_ERROR(Run(comparison.problem, algorithm, comparison.target.get(), stream));
  auto* const differs = static_cast<uint32_t*>(differs_.get());
  HEADSTART_RETURN_IF_ERROR(
      cuda::ToStatus(LaunchCompare({comparison.expected.get(), comparison.target.get(),
                                    BytesOf(comparison.problem.out), differs},
                                   stream),
                     "comparing products"));
  uint32_t answer = 1;
  HEADSTART_RETURN_IF_ERROR(cuda::ToStatus(
      cudaMemcpyAsync(&answer, differs, sizeof(answer), cudaMemcpyDeviceToHost, stream),
      "comparing products"));
  HEADSTART_RETURN_IF_ERROR(cuda::ToStatus(cudaStreamSynchronize(stream), "comparing products"));
  return answer == 0;
}

absl::StatusOr<CublasLtGemm::Algorithms> CublasLtGemm::Allowed(const Problem& problem,
                                                               cudaStream_t stream) {
  HEADSTART_ASSIGN_OR_RETURN(Algorithms candidates, Candidates(problem));
  if (fastest_) return candidates;
  HEADSTART_ASSIGN_OR_RETURN(const cublasLtMatmulAlgo_t measure, MeasureOf(problem));
  HEADSTART_ASSIGN_OR_RETURN(const Comparison comparison, Compare(problem, measure, stream));
  Algorithms allowed = {measure};
  for (const cublasLtMatmulAlgo_t& candidate : candidates) {
    HEADSTART_ASSIGN_OR_RETURN(const bool same, GivesSameBits(comparison, candidate, stream));
    if (same) allowed.push_back(candidate);
  }
  return allowed;
}

absl::StatusOr<cublasLtMatmulAlgo_t> CublasLtGemm::WithoutSearch(const Problem& problem) {
  if (!fastest_) return MeasureOf(problem);
  HEADSTART_ASSIGN_OR_RETURN(const Algorithms candidates, Candidates(problem));
  return candidates[0];
}

absl::StatusOr<float> CublasLtGemm::Time(const Problem& problem,
                                         const cublasLtMatmulAlgo_t& algorithm, void* target,
                                         cudaStream_t stream) {
  HEADSTART_RETURN_IF_ERROR(Run(problem, algorithm, target, stream));
  HEADSTART_RETURN_IF_ERROR(
      cuda::ToStatus(cudaEventRecord(begin_.get(), stream), "timing a product"));
  for (int i = 0; i < kTrialRuns; ++i)
    HEADSTART_RETURN_IF_ERROR(Run(problem, algorithm, target, stream));
  HEADSTART_RETURN_IF_ERROR(
      cuda::ToStatus(cudaEventRecord(end_.get(), stream), "timing a product"));
  HEADSTART_RETURN_IF_ERROR(WaitFor(end_, "timing a product"));
  float ms = 0.0f;
  HEADSTART_RETURN_IF_ERROR(
      cuda::ToStatus(cudaEventElapsedTime(&ms, begin_.get(), end_.get()), "timing a product"));
  return ms;
}

absl::StatusOr<cublasLtMatmulAlgo_t> CublasLtGemm::FindFastest(const Problem& problem,
                                                               cudaStream_t stream) {
  HEADSTART_ASSIGN_OR_RETURN(const Algorithms allowed, Allowed(problem, stream));
  if (allowed.size() == 1) return allowed[0];
  // Trial runs of an accumulating product must not change its output: they write elsewhere.
  DeviceMemory scratch;
  if (problem.beta() != 0.0f) {
    HEADSTART_ASSIGN_OR_RETURN(scratch, AllocateDevice(BytesOf(problem.out)));
  }
  void* const target = scratch != nullptr ? scratch.get() : problem.out.data;
  float best_ms = std::numeric_limits<float>::infinity();
  cublasLtMatmulAlgo_t best = allowed[0];
  for (const cublasLtMatmulAlgo_t& algorithm : allowed) {
    HEADSTART_ASSIGN_OR_RETURN(const float ms, Time(problem, algorithm, target, stream));
    if (ms < best_ms) {
      best_ms = ms;
      best = algorithm;
    }
  }
  return best;
}

absl::Status CublasLtGemm::Multiply(const CudaLinearWeight& weight, const Matrix& in,
                                    const Matrix& out, LinearOutput mode, cudaStream_t stream) {
  HEADSTART_ASSIGN_OR_RETURN(const Problem problem, Problem::Make(weight, in, out, mode));
  const auto rounded_rows = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(in.rows)));
  const std::pair<Kind, int64_t> key{KindOf(problem), rounded_rows};
  auto found = algorithms_.find(key);
  if (found == algorithms_.end()) {
    HEADSTART_ASSIGN_OR_RETURN(const cublasLtMatmulAlgo_t fastest, FindFastest(problem, stream));
    found = algorithms_.emplace(key, fastest).first;
  } else if (!Takes(problem, found->second)) {  // it was made for another number of rows
    HEADSTART_ASSIGN_OR_RETURN(const cublasLtMatmulAlgo_t other, WithoutSearch(problem));
    return Run(problem, other, out.data, stream);
  }
  return Run(problem, found->second, out.data, stream);
}

}  // namespace headstart::cuda
