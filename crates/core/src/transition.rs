//! The table of project statuses: which may follow which. Every other transition is an error.

use fermata_protocol::project::ProjectStatus::{self, *};

/// Every allowed transition: `(from, to, cause)`.
pub const TRANSITIONS: &[(ProjectStatus, ProjectStatus, &str)] = &[
    (Init, Planning, "the phase becomes planning"),
    (Init, Active, "an agent is started"),
    (Planning, Active, "an agent is started"),
    (Active, Stopped, "the last agent was stopped"),
    (Active, Completed, "every agent ended with exit code 0"),
    (Active, Failed, "an agent failed and none runs"),
    (Stopped, Active, "an agent is started"),
    (Completed, Active, "an agent is started"),
    (Failed, Active, "an agent is started"),
    (Active, Pausing, "a pause begins"),
    (Pausing, Active, "the pause was undone"),
    (Pausing, Paused, "the pause is committed"),
    (Pausing, Stopped, "the pause was undone and its agents have ended meanwhile"),
    (Pausing, Completed, "the pause was undone and its agents have ended meanwhile"),
    (Pausing, Failed, "the pause was undone and its agents have ended meanwhile"),
    (Paused, Resuming, "a resume begins"),
    (Resuming, Active, "the agents are brought back"),
    (Resuming, Stopped, "no agent came back, the last ones were stopped"),
    (Resuming, Completed, "every agent ended with exit code 0 at once"),
    (Resuming, Failed, "no agent came back"),
    (Paused, Restoring, "a restore begins"),
    (Restoring, Paused, "the restore ended"),
    (Init, Restoring, "a restore begins"),
    (Planning, Restoring, "a restore begins"),
    (Stopped, Restoring, "a restore begins"),
    (Completed, Restoring, "a restore begins"),
    (Failed, Restoring, "a restore begins"),
    (Restoring, Init, "the restore ended"),
    (Restoring, Planning, "the restore ended"),
    (Restoring, Stopped, "the restore ended"),
    (Restoring, Completed, "the restore ended"),
    (Restoring, Failed, "the restore ended"),
];

/// Says whether a project may change from one status to another; no change is always allowed.
pub fn is_allowed(from: ProjectStatus, to: ProjectStatus) -> bool {
    from == to || TRANSITIONS.iter().any(|(f, t, _)| *f == from && *t == to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_transition_stands_twice_and_paused_is_left_only_by_resume_or_restore() {
        for (i, (from, to, _)) in TRANSITIONS.iter().enumerate() {
            assert!(!TRANSITIONS[..i].iter().any(|(f, t, _)| f == from && t == to), "{from} -> {to}");
        }
        let after_paused: Vec<_> =
            TRANSITIONS.iter().filter(|(from, _, _)| *from == Paused).map(|(_, to, _)| *to).collect();
        assert_eq!(after_paused, [Resuming, Restoring]);
    }
}
