#include "kernels/cuda/gemm_cublaslt.h"

#include <bit>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr int kMaxCandidates = 8;
constexpr int kTrialRuns = 3;
constexpr int64_t kLeastRowsToTry = 1024;  // below, a product is too short for trial runs to pay

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

cudaDataType_t DataType(DType dtype) { return dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

}  // namespace

// One product in cuBLAS's column-major terms: row-major out [n, m] is D [m, n] = W^T x, W [k, m]
// and x [k, n] as stored.
struct CublasLtGemm::Problem {
  MatmulDesc desc;
  MatrixLayout weight_layout, in_layout, out_layout;
  const CudaLinearWeight* weight;
  Matrix in, out;
  float beta;

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
    problem.beta = mode == LinearOutput::kAdd ? 1.0f : 0.0f;
    return problem;
  }
};

absl::StatusOr<std::unique_ptr<CublasLtGemm>> CublasLtGemm::Create() {
  HEADSTART_ASSIGN_OR_RETURN(DeviceMemory workspace, AllocateDevice(kWorkspaceBytes));
  HEADSTART_ASSIGN_OR_RETURN(Event begin, MakeEvent(/*timed=*/true));
  HEADSTART_ASSIGN_OR_RETURN(Event end, MakeEvent(/*timed=*/true));
  cublasLtHandle_t handle = nullptr;
  HEADSTART_RETURN_IF_ERROR(ToStatus(cublasLtCreate(&handle), "start"));
  return std::unique_ptr<CublasLtGemm>(
      new CublasLtGemm(handle, std::move(workspace), std::move(begin), std::move(end)));
}

CublasLtGemm::CublasLtGemm(cublasLtHandle_t handle, DeviceMemory workspace, Event begin, Event end)
    : handle_(handle),
      workspace_(std::move(workspace)),
      begin_(std::move(begin)),
      end_(std::move(end)) {}

CublasLtGemm::~CublasLtGemm() { cublasLtDestroy(handle_); }

absl::Status CublasLtGemm::Run(const Problem& problem, const cublasLtMatmulAlgo_t& algorithm,
                               void* target, cudaStream_t stream) {
  const float alpha = 1.0f;
  return ToStatus(cublasLtMatmul(handle_, problem.desc.get(), &alpha, problem.weight->weight(),
                                 problem.weight_layout.get(), problem.in.data,
                                 problem.in_layout.get(), &problem.beta, problem.out.data,
                                 problem.out_layout.get(), target, problem.out_layout.get(),
                                 &algorithm, workspace_.get(), kWorkspaceBytes, stream),
                  "product");
}

absl::StatusOr<std::vector<cublasLtMatmulHeuristicResult_t>> CublasLtGemm::Candidates(
    const Problem& problem) {
  cublasLtMatmulPreference_t raw = nullptr;
  HEADSTART_RETURN_IF_ERROR(ToStatus(cublasLtMatmulPreferenceCreate(&raw), "preference"));
  const Preference preference(raw);
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cublasLtMatmulPreferenceSetAttribute(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                    &kWorkspaceBytes, sizeof(kWorkspaceBytes)),
               "preference"));
  std::vector<cublasLtMatmulHeuristicResult_t> results(kMaxCandidates);
  int found = 0;
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cublasLtMatmulAlgoGetHeuristic(handle_, problem.desc.get(),
                                              problem.weight_layout.get(), problem.in_layout.get(),
                                              problem.out_layout.get(), problem.out_layout.get(),
                                              raw, kMaxCandidates, results.data(), &found),
               absl::StrCat("algorithm for [", problem.in.rows, ", ", problem.in.cols, "] x [",
                            problem.in.cols, ", ", problem.out.cols, "]")));
  results.resize(found);
  if (found == 0) return absl::InternalError("cuBLASLt knows no algorithm for a product");
  return results;
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

absl::StatusOr<cublasLtMatmulAlgo_t> CublasLtGemm::FindAlgorithm(const Problem& problem,
                                                                 cudaStream_t stream) {
  HEADSTART_ASSIGN_OR_RETURN(const auto candidates, Candidates(problem));
  if (problem.in.rows < kLeastRowsToTry || candidates.size() == 1) return candidates[0].algo;
  // Trial runs of an accumulating product must not change its output: they write elsewhere.
  DeviceMemory scratch;
  if (problem.beta != 0.0f) {
    HEADSTART_ASSIGN_OR_RETURN(scratch, AllocateDevice(problem.out.rows * problem.out.row_stride *
                                                       DTypeBytes(problem.out.dtype)));
  }
  void* const target = scratch != nullptr ? scratch.get() : problem.out.data;
  float best_ms = std::numeric_limits<float>::infinity();
  cublasLtMatmulAlgo_t best = candidates[0].algo;
  for (const auto& candidate : candidates) {
    if (candidate.state != CUBLAS_STATUS_SUCCESS) continue;
    HEADSTART_ASSIGN_OR_RETURN(const float ms, Time(problem, candidate.algo, target, stream));
    if (ms < best_ms) {
      best_ms = ms;
      best = candidate.algo;
    }
  }
  return best;
}

absl::Status CublasLtGemm::Multiply(const CudaLinearWeight& weight, const Matrix& in,
                                    const Matrix& out, LinearOutput mode, cudaStream_t stream) {
  HEADSTART_ASSIGN_OR_RETURN(const Problem problem, Problem::Make(weight, in, out, mode));
  const auto rounded_rows = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(in.rows)));
  const Key key{weight.out_features(),  weight.in_features(),
                rounded_rows,           static_cast<int>(out.dtype),
                static_cast<int>(mode), weight.bias(out.dtype) != nullptr,
                in.row_stride,          out.row_stride};
  auto found = algorithms_.find(key);
  if (found != algorithms_.end()) {
    // Made for another number of rows: check that it takes this one.
    cublasLtMatmulHeuristicResult_t result{};
    const cublasStatus_t usable = cublasLtMatmulAlgoCheck(
        handle_, problem.desc.get(), problem.weight_layout.get(), problem.in_layout.get(),
        problem.out_layout.get(), problem.out_layout.get(), &found->second, &result);
    if (usable == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kWorkspaceBytes) {
      return Run(problem, found->second, out.data, stream);
    }
    HEADSTART_ASSIGN_OR_RETURN(const auto candidates, Candidates(problem));
    return Run(problem, candidates[0].algo, out.data, stream);
  }
  HEADSTART_ASSIGN_OR_RETURN(const cublasLtMatmulAlgo_t algorithm, FindAlgorithm(problem, stream));
  algorithms_.emplace(key, algorithm);
  return Run(problem, algorithm, out.data, stream);
}

}  // namespace headstart::cuda
