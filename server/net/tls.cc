#include "server/net/tls.h"

#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
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

absl::StatusOr<Bio> Open(const std::string& path) {
  Bio bio(BIO_new_file(path.c_str(), "r"), BIO_free);
  if (bio == nullptr) return FileError(path, "can't be read");
  return bio;
}

absl::StatusOr<Certificate> ReadCertificate(const std::string& path) {
  HEADSTART_ASSIGN_OR_RETURN(const Bio bio, Open(path));
  Certificate certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr), X509_free);
  if (certificate == nullptr) return FileError(path, "holds no certificate in PEM");
  return certificate;
}

absl::StatusOr<Key> ReadKey(const std::string& path) {
  HEADSTART_ASSIGN_OR_RETURN(const Bio bio, Open(path));
  // Without the callback OpenSSL would ask a terminal for the password.
  const auto no_password = [](char*, int, int, void*) { return 0; };
  Key key(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_password, nullptr), EVP_PKEY_free);
  if (key == nullptr) return FileError(path, "holds no unencrypted private key in PEM");
  return key;
}

absl::Status CheckFiles(const ServerTlsOptions& options) {
  HEADSTART_ASSIGN_OR_RETURN(const Certificate certificate, ReadCertificate(options.cert_file));
  HEADSTART_ASSIGN_OR_RETURN(const Key key, ReadKey(options.key_file));
  if (X509_check_private_key(certificate.get(), key.get()) != 1) {
    return FileError(options.key_file, absl::StrCat("is not the key of ", options.cert_file));
  }
  if (options.client_ca_file.empty()) return absl::OkStatus();
  return ReadCertificate(options.client_ca_file).status();
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeCredentials(
    const ServerTlsOptions& options) {
  if (!options.enabled()) return grpc::InsecureServerCredentials();
  HEADSTART_RETURN_IF_ERROR(CheckFiles(options));
  const bool mutual = !options.client_ca_file.empty();
  auto provider = std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
      options.key_file, options.cert_file, options.client_ca_file, options.reload_seconds);
  grpc::experimental::TlsServerCredentialsOptions tls(std::move(provider));
  tls.watch_identity_key_cert_pairs();
  if (mutual) tls.watch_root_certs();
  tls.set_cert_request_type(mutual ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                                   : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  return grpc::experimental::TlsServerCredentials(tls);
}

}  // namespace headstart
