//! What a command ends with when it does not succeed: an exit code, a stable code, a sentence, a hint.
//!
//! Nothing here prints except [`Failure::print`], and that only on stderr.

use std::io::{self, Write as _};

use fermata_protocol::client::ClientError;
use fermata_protocol::{Code, Refusal};
use serde_json::{Value, json};

/// The exit codes of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Refused or failed.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// No such project, agent, checkpoint …
    NotFound,
    /// No daemon answers.
    Unreachable,
    /// A question is still open.
    WaitingForInput,
    /// The time was over.
    TimedOut,
}

impl Exit {
    /// Returns the number that the process exits with.
    pub fn number(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Unreachable => 4,
            Self::WaitingForInput => 5,
            Self::TimedOut => 6,
        }
    }

    /// Returns the exit code that goes with a refusal of the daemon.
    pub fn of(code: Code) -> Self {
        match code {
            Code::TimedOut => Self::TimedOut,
            code if code.as_str().ends_with("_not_found") => Self::NotFound,
            _ => Self::Failed,
        }
    }
}

/// Why a command did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// Whoever read stdout wants no more; nothing is wrong and nothing is said.
    ReaderGone,
    /// Something to say.
    Said(Box<Report>),
}

/// What is said about a failure.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// What the process exits with.
    pub exit: Exit,
    /// The daemon's stable code, or one of the command line's own.
    pub code: String,
    /// One sentence.
    pub message: String,
    /// What to type or do next.
    pub hint: Option<String>,
    /// Further fields for programs.
    pub details: Option<Value>,
}

impl Failure {
    /// Makes a failure without a hint.
    pub fn new(exit: Exit, code: &str, message: impl Into<String>) -> Self {
        Self::Said(Box::new(Report { exit, code: code.into(), message: message.into(), hint: None, details: None }))
    }

    /// Makes the failure of a command line that makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "usage", message)
    }

    /// Makes the failure of something that was tried here, not in the daemon.
    pub fn local(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, "failed", message)
    }

    /// Makes the failure of an operation on a file or on the system.
    pub fn io(what: impl std::fmt::Display, error: &io::Error) -> Self {
        Self::local(format!("failed to {what}: {error}"))
    }

    /// Makes the failure of a time that was over.
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(Exit::TimedOut, Code::TimedOut.as_str(), message)
    }

    /// Adds what to type or do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if let Self::Said(report) = &mut self {
            report.hint = Some(hint.into());
        }
        self
    }

    /// Adds further fields for programs.
    #[must_use]
    pub fn with_details(mut self, details: Value) -> Self {
        if let Self::Said(report) = &mut self {
            report.details = Some(details);
        }
        self
    }

    /// Says whether the failure has this stable code.
    pub fn is(&self, code: Code) -> bool {
        matches!(self, Self::Said(report) if report.code == code.as_str())
    }

    /// Returns the number that the process exits with.
    pub fn exit_number(&self) -> u8 {
        match self {
            Self::ReaderGone => 0,
            Self::Said(report) => report.exit.number(),
        }
    }

    /// Tells the failure on stderr, as one JSON line when `json`.
    pub fn print(&self, json: bool) {
        let Self::Said(report) = self else { return };
        let mut text = String::new();
        if json {
            let mut error = json!({ "code": report.code, "message": report.message });
            if let Some(hint) = &report.hint {
                error["hint"] = hint.as_str().into();
            }
            if let Some(details) = &report.details {
                error["details"] = details.clone();
            }
            text.push_str(&json!({ "error": error }).to_string());
            text.push('\n');
        } else {
            text.push_str(&format!("error: {}\n", shown(&report.message)));
            for line in report.hint.iter().flat_map(|hint| hint.lines()) {
                text.push_str(&format!("hint: {}\n", shown(line)));
            }
        }
        // There is no third place to complain when stderr is closed.
        let _ = io::stderr().write_all(text.as_bytes()).is_ok();
    }
}

/// Keeps line breaks (a log's tail has them) and takes the teeth out of everything else.
fn shown(text: &str) -> String {
    text.lines().map(crate::output::clean).collect::<Vec<_>>().join("\n")
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Said(Box::new(Report {
            exit: Exit::of(refusal.code),
            code: refusal.code.as_str().into(),
            message: refusal.message,
            hint: refusal.hint,
            details: refusal.details,
        }))
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(refusal) => refusal.into(),
            ClientError::Unreachable { path, source } => Self::new(
                Exit::Unreachable,
                "unreachable",
                format!("no daemon answers at {}: {source}", path.display()),
            ),
            ClientError::Broken(source)
                if matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
            {
                Self::timed_out("the daemon did not answer in time")
            }
            error @ (ClientError::Broken(_) | ClientError::Closed) => Self::new(
                Exit::Unreachable,
                "connection_broken",
                match std::error::Error::source(&error) {
                    Some(cause) => format!("{error}: {cause}"),
                    None => error.to_string(),
                },
            )
            .hint("fermatactl doctor shows whether the daemon still runs"),
            error @ ClientError::Garbled(_) => Self::new(Exit::Failed, "garbled_reply", error.to_string())
                .hint("fermatactl version shows whether client and daemon fit together"),
        }
    }
}

/// The error of a write to stdout.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::ReaderGone } else { Self::io("write the output", &error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_map_to_the_documented_exit_codes() {
        for (code, number) in [
            (Code::ProjectNotFound, 3),
            (Code::AgentNotFound, 3),
            (Code::ContextItemNotFound, 3),
            (Code::TimedOut, 6),
            (Code::AlreadyPaused, 1),
            (Code::InternalError, 1),
            (Code::InvalidParams, 1),
        ] {
            assert_eq!(Exit::of(code).number(), number, "{code}");
        }
    }

    #[test]
    fn client_errors_map_to_unreachable_timed_out_or_failed() {
        let failure = Failure::from(ClientError::Unreachable {
            path: "/x".into(),
            source: io::Error::from(io::ErrorKind::NotFound),
        });
        assert_eq!(failure.exit_number(), 4);
        let slow = ClientError::Broken(io::Error::from(io::ErrorKind::WouldBlock));
        assert_eq!(Failure::from(slow).exit_number(), 6);
        assert_eq!(Failure::from(ClientError::Closed).exit_number(), 4);
        let garbled = ClientError::Garbled("x".into());
        assert_eq!(Failure::from(garbled).exit_number(), 1);
    }

    #[test]
    fn a_reader_that_left_is_no_error() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(failure.exit_number(), 0);
    }
}
