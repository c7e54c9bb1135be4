//! Resource limits of processes.

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

/// The resources of setrlimit(2), serialised under the names that prlimit(1) uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names are those of setrlimit(2)")]
pub enum LimitKind {
    As,
    Core,
    Cpu,
    Data,
    Fsize,
    Locks,
    Memlock,
    Msgqueue,
    Nice,
    Nofile,
    Nproc,
    Rss,
    Rtprio,
    Rttime,
    Sigpending,
    Stack,
}

impl LimitKind {
    pub const ALL: [Self; 16] = [
        Self::As,
        Self::Core,
        Self::Cpu,
        Self::Data,
        Self::Fsize,
        Self::Locks,
        Self::Memlock,
        Self::Msgqueue,
        Self::Nice,
        Self::Nofile,
        Self::Nproc,
        Self::Rss,
        Self::Rtprio,
        Self::Rttime,
        Self::Sigpending,
        Self::Stack,
    ];

    fn resource(self) -> Resource {
        match self {
            Self::As => Resource::RLIMIT_AS,
            Self::Core => Resource::RLIMIT_CORE,
            Self::Cpu => Resource::RLIMIT_CPU,
            Self::Data => Resource::RLIMIT_DATA,
            Self::Fsize => Resource::RLIMIT_FSIZE,
            Self::Locks => Resource::RLIMIT_LOCKS,
            Self::Memlock => Resource::RLIMIT_MEMLOCK,
            Self::Msgqueue => Resource::RLIMIT_MSGQUEUE,
            Self::Nice => Resource::RLIMIT_NICE,
            Self::Nofile => Resource::RLIMIT_NOFILE,
            Self::Nproc => Resource::RLIMIT_NPROC,
            Self::Rss => Resource::RLIMIT_RSS,
            Self::Rtprio => Resource::RLIMIT_RTPRIO,
            Self::Rttime => Resource::RLIMIT_RTTIME,
            Self::Sigpending => Resource::RLIMIT_SIGPENDING,
            Self::Stack => Resource::RLIMIT_STACK,
        }
    }
}

/// One limit; `None` means unlimited. The units are those of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    pub kind: LimitKind,
    /// The enforced value.
    pub soft: Option<u64>,
    /// The value to which the process may raise `soft`.
    pub hard: Option<u64>,
}

fn to_raw(value: Option<u64>) -> u64 {
    value.unwrap_or(RLIM_INFINITY)
}

fn from_raw(value: u64) -> Option<u64> {
    (value != RLIM_INFINITY).then_some(value)
}

/// Returns one limit of this process.
pub fn get(kind: LimitKind) -> io::Result<Limit> {
    let (soft, hard) = getrlimit(kind.resource())?;
    Ok(Limit { kind, soft: from_raw(soft), hard: from_raw(hard) })
}

/// Returns all limits of this process.
pub fn get_all() -> io::Result<Vec<Limit>> {
    LimitKind::ALL.into_iter().map(get).collect()
}

/// Sets one limit of this process.
///
/// Without the privilege to raise a hard limit, the limit is set as high as possible: a slightly lower limit is better
/// than no agent. Allocates no memory, so it may run between fork and exec.
pub fn set_up_to_hard(limit: &Limit) -> Result<(), Errno> {
    let (soft, hard) = (to_raw(limit.soft), to_raw(limit.hard));
    match setrlimit(limit.kind.resource(), soft, hard) {
        Err(Errno::EPERM) => {
            let (_, ceiling) = getrlimit(limit.kind.resource())?;
            let hard = hard.min(ceiling);
            setrlimit(limit.kind.resource(), soft.min(hard), hard)
        }
        other => other,
    }
}

/// Raises the soft limit of open files to the hard limit: a daemon with a thousand agents needs more than the usual
/// 1,024. Returns the previous limit, which agents without a limit of their own start with, since programs that use
/// select(2) fail above 1,024.
pub fn raise_open_files() -> io::Result<Limit> {
    let before = get(LimitKind::Nofile)?;
    setrlimit(Resource::RLIMIT_NOFILE, to_raw(before.hard), to_raw(before.hard))?;
    Ok(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_can_be_read_and_survives_json() {
        let all = get_all().unwrap();
        assert_eq!(all.len(), LimitKind::ALL.len());
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Limit>>(&text).unwrap(), all);
    }

    #[test]
    fn the_daemon_gets_as_many_files_as_it_may() {
        let before = raise_open_files().unwrap();
        assert_eq!(get(LimitKind::Nofile).unwrap(), Limit { soft: before.hard, ..before });
    }
}
