//! The two ways in which a call fails: a refusal (it is not allowed, nothing was changed) and a fault (something broke).

use std::error::Error;
use std::path::Path;

use fermata_protocol::{Code, ErrorObject, Refusal, error_chain};

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Fault(Fault),
}

/// An error of Fermata or of the system below it, as text with its causes.
#[derive(Debug, Clone)]
pub struct Fault {
    code: Code,
    text: String,
}

impl Fault {
    /// Makes a fault of an error and its causes; `doing` completes the sentence "failed to …".
    pub fn of(doing: &str, error: &(dyn Error + 'static)) -> Self {
        Self { code: code_of(error), text: format!("failed to {doing}: {}", error_chain(error)) }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// Returns the code of an error: a full disk has one of its own, which scripts can act on.
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

    /// Returns a function that makes a fault of an error about a file, for instance
    /// `read(path).map_err(Failure::io("read", path))`.
    pub fn io<E: Error + 'static>(verb: &str, path: &Path) -> impl FnOnce(E) -> Self {
        move |error| Self::fault(&format!("{verb} {}", path.display()), &error)
    }

    /// Returns the error of the wire.
    pub fn to_object(&self) -> ErrorObject {
        match self {
            Self::Refused(refusal) => refusal.clone().into(),
            Self::Fault(fault) => {
                let refusal = Refusal::new(fault.code, fault.text.clone());
                if fault.code == Code::DiskFull {
                    refusal.hint("free some space on the file system of the state directory").into()
                } else {
                    refusal.into()
                }
            }
        }
    }

    /// Returns the error of an operation: an internal error gets the code of the operation.
    pub fn into_error(self, code: Code) -> ErrorObject {
        match self {
            Self::Refused(refusal) => refusal.into(),
            Self::Fault(fault) if fault.code == Code::InternalError => Refusal::new(code, fault.text).into(),
            Self::Fault(_) => self.to_object(),
        }
    }
}
