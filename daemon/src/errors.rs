//! The two ways in which a call does not succeed: a refusal (we said no) and a fault (we broke).

use std::error::Error;

use fermata_protocol::{Code, ErrorObject, Refusal, error_chain};

/// Why a call did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// We said no; nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// We broke.
    #[error("{0}")]
    Fault(Fault),
}

/// Something of Fermata's own, or under it, broke.
#[derive(Debug, Clone)]
pub struct Fault {
    code: Code,
    text: String,
}

impl Fault {
    /// Makes a fault of an error and its causes.
    pub fn of(doing: &str, error: &(dyn Error + 'static)) -> Self {
        Self { code: code_of(error), text: format!("failed to {doing}: {}", error_chain(error)) }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// A full disk is no bug of ours and has a code that scripts can act on.
fn code_of(error: &(dyn Error + 'static)) -> Code {
    let mut next = Some(error);
    while let Some(error) = next {
        let full = error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| matches!(e.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded));
        if full || error.to_string().contains("database or disk is full") {
            return Code::DiskFull;
        }
        next = error.source();
    }
    Code::InternalError
}

impl Failure {
    /// Makes a fault of an error and its causes, for instance `Failure::fault("read the log", &error)`.
    pub fn fault(doing: &str, error: &(dyn Error + 'static)) -> Self {
        Self::Fault(Fault::of(doing, error))
    }

    /// Returns what the wire carries.
    pub fn to_object(&self) -> ErrorObject {
        match self {
            Self::Refused(refusal) => refusal.clone().into(),
            Self::Fault(fault) => {
                let refusal = Refusal::new(fault.code, fault.text.clone());
                match fault.code {
                    Code::DiskFull => refusal.hint("free some space on the file system of the state directory"),
                    _ => refusal,
                }
                .into()
            }
        }
    }

    /// Returns what an operation that fails so reports: the same reason under the operation's own code.
    pub fn into_error(self, code: Code) -> ErrorObject {
        match self {
            Self::Refused(refusal) => refusal.into(),
            Self::Fault(fault) if fault.code == Code::InternalError => Refusal::new(code, fault.text).into(),
            Self::Fault(_) => self.to_object(),
        }
    }
}
