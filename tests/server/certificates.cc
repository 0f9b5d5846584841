#include "tests/server/certificates.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace headstart::testing {
namespace {

void OpenSsl(const std::string& arguments) {
  HEADSTART_CHECK(std::system(absl::StrCat("openssl ", arguments, " 2>/dev/null").c_str()) == 0);
}

constexpr char kNewKey[] = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

}  // namespace

Identity MakeAuthority(const std::string& dir, const std::string& name) {
  const Identity out = {absl::StrCat(dir, "/", name, ".crt"), absl::StrCat(dir, "/", name, ".key")};
  OpenSsl(absl::StrCat("req -x509 ", kNewKey, " -subj /CN=", name, " -days 2 -keyout ",
                       out.key_file, " -out ", out.cert_file));
  return out;
}

Identity MakeIdentity(const std::string& dir, const std::string& name, const Identity& authority,
                      const std::string& san, int days) {
  const Identity out = {absl::StrCat(dir, "/", name, ".crt"), absl::StrCat(dir, "/", name, ".key")};
  const std::string request = absl::StrCat(dir, "/", name, ".csr");
  const std::string extensions = absl::StrCat(dir, "/", name, ".ext");
  std::ofstream(extensions) << "subjectAltName=" << san << "\n";
  OpenSsl(absl::StrCat("req ", kNewKey, " -subj /CN=", name, " -keyout ", out.key_file, " -out ",
                       request));
  OpenSsl(absl::StrCat("x509 -req -in ", request, " -CA ", authority.cert_file, " -CAkey ",
                       authority.key_file, " -CAcreateserial -days ", days, " -extfile ",
                       extensions, " -out ", out.cert_file));
  return out;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  HEADSTART_CHECK(file.good());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void Replace(const Identity& to, const Identity& from) {
  std::filesystem::rename(from.key_file, to.key_file);
  std::filesystem::rename(from.cert_file, to.cert_file);
}

}  // namespace headstart::testing
