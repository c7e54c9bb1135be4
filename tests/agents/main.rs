//! A real agent under Fermata: the Codex CLI with a model server on loopback that follows a script of the test. No
//! network, no account.
//!
//! The tests are ignored by default, since they need the CLI: `make test-agents` installs it and runs them with its
//! path in `FERMATA_TEST_CODEX`.

mod bare;
mod codex;
mod http;
mod model_server;
mod pause_and_resume;
