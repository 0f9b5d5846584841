#include "server/net/self_check.h"

#include <grpcpp/create_channel_posix.h>
#include <grpcpp/generic/generic_stub.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/socket.h>

#include <future>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"
#include "proto/grpc_time.h"

namespace headstart {
namespace {

using Context = std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)>;
using Connection = std::unique_ptr<SSL, decltype(&SSL_free)>;

constexpr unsigned char kHttp2[] = {2, 'h', '2'};

absl::Status HandshakeError(absl::string_view problem) {
  ERR_clear_error();
  return absl::UnavailableError(absl::StrCat("TLS handshake with the own listener: ", problem));
}

// A client of TLS 1.3, whose handshake is over before it sends its certificate; between memory and
// the socket stands Exchange.
Connection NewClient(SSL_CTX* context) {
  Connection client(SSL_new(context), SSL_free);
  SSL_set_bio(client.get(), BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
  SSL_set_alpn_protos(client.get(), kHttp2, sizeof(kHttp2));
  SSL_set_min_proto_version(client.get(), TLS1_3_VERSION);
  SSL_set_connect_state(client.get());
  return client;
}

// Sends what the client has to say, and waits for an answer.
absl::Status Exchange(SSL* client, int fd, Instant deadline) {
  char buffer[4096];
  for (int n = BIO_read(SSL_get_wbio(client), buffer, sizeof(buffer)); n > 0;
       n = BIO_read(SSL_get_wbio(client), buffer, sizeof(buffer))) {
    if (send(fd, buffer, static_cast<size_t>(n), MSG_NOSIGNAL) != n) {
      return HandshakeError("can't send");
    }
  }
  const int64_t left_ms = absl::ToInt64Milliseconds(deadline - Instant::Now());
  pollfd waiting = {fd, POLLIN, 0};
  if (left_ms <= 0 || poll(&waiting, 1, static_cast<int>(left_ms)) != 1) {
    return HandshakeError("no answer in time");
  }
  const ssize_t count = recv(fd, buffer, sizeof(buffer), 0);
  if (count <= 0) return HandshakeError("the server closed the connection");
  BIO_write(SSL_get_rbio(client), buffer, static_cast<int>(count));
  return absl::OkStatus();
}

// Of the certificate that the server has shown.
absl::Status CheckShown(SSL* client) {
  const std::unique_ptr<X509, decltype(&X509_free)> shown(SSL_get1_peer_certificate(client),
                                                          X509_free);
  if (shown == nullptr) return HandshakeError("no certificate");
  if (X509_cmp_current_time(X509_get0_notAfter(shown.get())) > 0) return absl::OkStatus();
  return HandshakeError("the certificate has expired");
}

}  // namespace

absl::Status CheckTlsHandshake(Listener& listener, const Listener::Handler& serve,
                               absl::Duration timeout) {
  const Instant deadline = Instant::Now() + timeout;
  HEADSTART_ASSIGN_OR_RETURN(OwnConnection own, listener.ConnectToSelf(timeout));
  serve(own.server.Release());
  const Context context(SSL_CTX_new(TLS_client_method()), SSL_CTX_free);
  const Connection client = NewClient(context.get());
  for (int done = SSL_do_handshake(client.get()); done != 1;
       done = SSL_do_handshake(client.get())) {
    if (SSL_get_error(client.get(), done) != SSL_ERROR_WANT_READ) {
      const char* reason = ERR_reason_error_string(ERR_peek_last_error());
      return HandshakeError(reason == nullptr ? "failed" : reason);
    }
    HEADSTART_RETURN_IF_ERROR(Exchange(client.get(), own.client.get(), deadline));
  }
  return CheckShown(client.get());
}

absl::Status CheckThroughListener(Listener& listener, const Listener::Handler& serve_health,
                                  absl::Duration timeout) {
  HEADSTART_ASSIGN_OR_RETURN(OwnConnection own, listener.ConnectToSelf(timeout));
  serve_health(own.server.Release());
  grpc::GenericStub stub(grpc::CreateInsecureChannelFromFd("self", own.client.Release()));
  grpc::ClientContext context;
  context.set_deadline(Instant::Now() + timeout);
  const grpc::Slice nothing;  // an empty HealthCheckRequest asks for the whole server
  const grpc::ByteBuffer request(&nothing, 1);
  grpc::ByteBuffer response;
  std::promise<grpc::Status> answer;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", grpc::StubOptions(), &request, &response,
                 [&answer](grpc::Status status) { answer.set_value(std::move(status)); });
  const grpc::Status status = answer.get_future().get();
  if (status.ok()) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("no answer through the own listener: ", status.error_message()));
}

}  // namespace headstart
