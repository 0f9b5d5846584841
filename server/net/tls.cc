#include "server/net/tls.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <algorithm>
#include <ctime>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;
using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;

absl::Status FileError(const std::string& path, absl::string_view problem) {
  ERR_clear_error();
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", problem));
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file.is_open() || file.bad() || text.empty()) {
    return FileError(path, "can't be read, or is empty");
  }
  return text;
}

Bio Over(const std::string& text) {
  return Bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), BIO_free);
}

// All certificates of a file, one at least.
absl::StatusOr<std::vector<Certificate>> ParseCertificates(const std::string& path,
                                                           const std::string& text) {
  const Bio bio = Over(text);
  std::vector<Certificate> out;
  while (X509* certificate = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    out.emplace_back(certificate, X509_free);
  }
  const bool at_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  ERR_clear_error();
  if (out.empty()) return FileError(path, "holds no certificate in PEM");
  if (!at_end) return FileError(path, "is damaged after its first certificates");
  return out;
}

absl::StatusOr<Key> ParseKey(const std::string& path, const std::string& text) {
  // Without the callback OpenSSL would ask a terminal for the password.
  const auto no_password = [](char*, int, int, void*) { return 0; };
  Key key(PEM_read_bio_PrivateKey(Over(text).get(), nullptr, no_password, nullptr), EVP_PKEY_free);
  if (key == nullptr) return FileError(path, "holds no unencrypted private key in PEM");
  return key;
}

absl::Time ToTime(const ASN1_TIME* time) {
  std::tm parts = {};
  ASN1_TIME_to_tm(time, &parts);
  return absl::FromTimeT(timegm(&parts));
}

absl::Time NotAfter(const Certificate& certificate) {
  return ToTime(X509_get0_notAfter(certificate.get()));
}

absl::Status CheckValid(const std::string& path, const Certificate& certificate, absl::Time now) {
  const absl::Time from = ToTime(X509_get0_notBefore(certificate.get()));
  if (now >= from && now < NotAfter(certificate)) return absl::OkStatus();
  return FileError(path, absl::StrCat("is valid from ", absl::FormatTime(from), " to ",
                                      absl::FormatTime(NotAfter(certificate)), ", not now"));
}

absl::Status ReadIdentity(const ServerTlsOptions& options, absl::Time now, TlsSet* set) {
  HEADSTART_ASSIGN_OR_RETURN(set->cert_chain, ReadText(options.cert_file));
  HEADSTART_ASSIGN_OR_RETURN(set->key, ReadText(options.key_file));
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<Certificate> chain,
                             ParseCertificates(options.cert_file, set->cert_chain));
  HEADSTART_ASSIGN_OR_RETURN(const Key key, ParseKey(options.key_file, set->key));
  if (X509_check_private_key(chain.front().get(), key.get()) != 1) {
    return FileError(options.key_file, absl::StrCat("is not the key of ", options.cert_file));
  }
  set->not_after = NotAfter(chain.front());
  return CheckValid(options.cert_file, chain.front(), now);
}

// A bundle may hold an old authority beside its successor.
absl::Status ReadClientCa(const ServerTlsOptions& options, absl::Time now, TlsSet* set) {
  const std::string& path = options.client_ca_file;
  if (path.empty()) return absl::OkStatus();
  HEADSTART_ASSIGN_OR_RETURN(set->client_ca, ReadText(path));
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<Certificate> bundle,
                             ParseCertificates(path, set->client_ca));
  const auto last = std::max_element(bundle.begin(), bundle.end(),
                                     [](const Certificate& left, const Certificate& right) {
                                       return NotAfter(left) < NotAfter(right);
                                     });
  set->client_ca_not_after = NotAfter(*last);
  return CheckValid(path, *last, now);
}

// gRPC asks at every handshake.
grpc_ssl_certificate_config_reload_status Fetch(void* identity,
                                                grpc_ssl_server_certificate_config** config) {
  const std::optional<TlsSet> set = static_cast<TlsIdentity*>(identity)->TakeChanged();
  if (!set.has_value()) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
  const grpc_ssl_pem_key_cert_pair pair = {set->key.c_str(), set->cert_chain.c_str()};
  // gRPC 1.51 wants roots even where it asks for no certificate.
  const std::string& roots = set->client_ca.empty() ? set->cert_chain : set->client_ca;
  *config = grpc_ssl_server_certificate_config_create(roots.c_str(), &pair, 1);
  return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
}

// gRPC 1.51 has these in C only; what its C++ side offers for changing certificates takes whatever
// it finds in files.
class FetchedCredentials final : public grpc::ServerCredentials {
 public:
  explicit FetchedCredentials(grpc_server_credentials* credentials) : credentials_(credentials) {}
  ~FetchedCredentials() override { grpc_server_credentials_release(credentials_); }
  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  grpc_server_credentials* const credentials_;
};

}  // namespace

absl::StatusOr<TlsSet> ReadTlsSet(const ServerTlsOptions& options, absl::Time now) {
  TlsSet set;
  HEADSTART_RETURN_IF_ERROR(ReadIdentity(options, now, &set));
  HEADSTART_RETURN_IF_ERROR(ReadClientCa(options, now, &set));
  return set;
}

absl::StatusOr<std::unique_ptr<TlsIdentity>> TlsIdentity::Load(const ServerTlsOptions& options) {
  HEADSTART_ASSIGN_OR_RETURN(TlsSet set, ReadTlsSet(options, absl::Now()));
  return std::unique_ptr<TlsIdentity>(new TlsIdentity(options, std::move(set)));
}

TlsIdentity::TlsIdentity(const ServerTlsOptions& options, TlsSet set)
    : options_(options), set_(std::move(set)) {}

absl::StatusOr<bool> TlsIdentity::Reload() {
  absl::StatusOr<TlsSet> found = ReadTlsSet(options_, absl::Now());
  MutexLock lock(&mutex_);
  if (!found.ok()) {
    ++rejected_;
    return found.status();
  }
  if (*found == set_) return false;
  set_ = *std::move(found);
  changed_ = true;
  ++loaded_;
  return true;
}

std::shared_ptr<grpc::ServerCredentials> TlsIdentity::MakeCredentials() {
  const auto request = options_.client_ca_file.empty()
                           ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                           : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  return std::make_shared<FetchedCredentials>(grpc_ssl_server_credentials_create_with_options(
      grpc_ssl_server_credentials_create_options_using_config_fetcher(request, Fetch, this)));
}

std::optional<TlsSet> TlsIdentity::TakeChanged() {
  MutexLock lock(&mutex_);
  if (!std::exchange(changed_, false)) return std::nullopt;
  return set_;
}

TlsStats TlsIdentity::stats() const {
  MutexLock lock(&mutex_);
  return {loaded_, rejected_, set_.not_after, set_.client_ca_not_after};
}

}  // namespace headstart
