//! New ids and tokens: the only randomness besides jitter.

use fermata_core::command::NewRun;
use fermata_protocol::{OperationId, RunId};
use sha2::{Digest as _, Sha256};

use crate::hashing::hex;
use fermata_os::clock;

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(error) = getrandom::fill(&mut bytes) {
        // Without the kernel's random numbers no token would be a secret.
        panic!("the kernel gives no random numbers: {error}");
    }
    bytes
}

/// Ids begin with the time, so that later ones sort after earlier ones.
fn id(prefix: &str) -> String {
    format!("{prefix}-{:011x}{}", clock::unix_ms(), hex(&random::<4>()))
}

/// Makes the id of a new operation.
pub fn new_operation() -> OperationId {
    OperationId::new(id("op")).unwrap_or_else(|e| unreachable!("an id of our own is valid: {e}"))
}

/// Makes a text that no other start of a daemon has.
pub fn new_boot_epoch() -> String {
    id("epoch")
}

/// A run with its token.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// The run.
    pub run: RunId,
    /// Its secret.
    pub token: String,
}

/// Makes the identity of a new run, and its token.
pub fn new_run() -> (NewRun, NewToken) {
    let run = RunId::new(id("run")).unwrap_or_else(|e| unreachable!("an id of our own is valid: {e}"));
    let token = hex(&random::<16>());
    let token_sha256 = hex(&Sha256::digest(token.as_bytes()));
    (NewRun { id: run.clone(), token_sha256 }, NewToken { run, token })
}
