// headstart.v1.PrefillService: hands calls to those who do the work.
#pragma once

#include "headstart/v1/prefill.grpc.pb.h"
#include "server/rpc/service_context.h"

namespace headstart {

// Requests arrive as raw bytes, so that malformed ones get INVALID_ARGUMENT; the generated methods
// would answer UNIMPLEMENTED.
class PrefillService final
    : public v1::PrefillService::WithRawCallbackMethod_FetchKv<
          v1::PrefillService::WithRawCallbackMethod_RenewLease<
              v1::PrefillService::WithRawCallbackMethod_ReleaseKv<
                  v1::PrefillService::WithRawCallbackMethod_GetModelInfo<
                      v1::PrefillService::WithRawCallbackMethod_GetServerInfo<
                          v1::PrefillService::WithRawCallbackMethod_Estimate<
                              v1::PrefillService::WithRawCallbackMethod_GetLoads<
                                  v1::PrefillService::Service>>>>>>> {
 public:
  // `context` outlives the service.
  explicit PrefillService(ServiceContext* context);

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* FetchKv(
      grpc::CallbackServerContext* call) override;
  grpc::ServerUnaryReactor* RenewLease(grpc::CallbackServerContext* call,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ReleaseKv(grpc::CallbackServerContext* call,
                                      const grpc::ByteBuffer* request,
                                      grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* call,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* call,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Estimate(grpc::CallbackServerContext* call,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetLoads(grpc::CallbackServerContext* call,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;

 private:
  // Ends a call that has one request.
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* call,
                                   const grpc::ByteBuffer& request,
                                   const absl::Status& status) const;
  absl::Status Renew(const grpc::CallbackServerContext& call, const grpc::ByteBuffer& request,
                     grpc::ByteBuffer* response) const;
  absl::Status Release(const grpc::CallbackServerContext& call, const grpc::ByteBuffer& request,
                       grpc::ByteBuffer* response) const;
  absl::Status DescribeModel(const grpc::CallbackServerContext& call,
                             const grpc::ByteBuffer& request, grpc::ByteBuffer* response) const;
  absl::Status DescribeServer(const grpc::CallbackServerContext& call,
                              const grpc::ByteBuffer& request, grpc::ByteBuffer* response) const;
  absl::Status Foresee(const grpc::CallbackServerContext& call, const grpc::ByteBuffer& request,
                       grpc::ByteBuffer* response) const;
  absl::Status DescribeLoads(const grpc::CallbackServerContext& call,
                             const grpc::ByteBuffer& request, grpc::ByteBuffer* response) const;

  ServiceContext& context_;
};

}  // namespace headstart
