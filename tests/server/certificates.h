// Certificates made with the openssl program.
#pragma once

#include <string>

namespace headstart::testing {

// A certificate and its key as PEM files.
struct Identity {
  std::string cert_file;
  std::string key_file;
};

// An authority that signs itself, in the folder.
Identity MakeAuthority(const std::string& dir, const std::string& name);

// A certificate for server and client use, signed by `authority`. `san` as openssl writes it:
// "DNS:decode.example" or "IP:127.0.0.1". It ends after `days`; -1: it has ended.
Identity MakeIdentity(const std::string& dir, const std::string& name, const Identity& authority,
                      const std::string& san, int days = 2);

std::string ReadFile(const std::string& path);

// Puts `from` in the place of `to`, key and certificate at once as far as files can.
void Replace(const Identity& to, const Identity& from);

}  // namespace headstart::testing
