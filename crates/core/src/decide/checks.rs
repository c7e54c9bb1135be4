//! The checks that several decisions share.

use fermata_protocol::{AgentName, Code, ErrorObject, Refusal};

use crate::agent::Agent;
use crate::project::{BrokenRestore, Project, ProjectState};

/// Finds an agent or refuses.
pub(super) fn agent<'a>(project: &'a Project, name: &AgentName) -> Result<&'a Agent, Refusal> {
    project.agents.get(name).map(|agent| &**agent).ok_or_else(|| {
        Refusal::new(Code::AgentNotFound, format!("project '{}' has no agent '{name}'", project.name))
            .hint(format!("fermatactl ps {}", project.name))
    })
}

/// Refuses while an operation is in progress, with the code that names the operation's kind.
pub(super) fn refuse_during_operation(project: &Project) -> Result<(), Refusal> {
    let (code, kind, operation) = match &*project.state {
        ProjectState::Pausing(pause) => (Code::PauseInProgress, "a pause", &pause.operation),
        ProjectState::Resuming(resume) => (Code::ResumeInProgress, "a resume", &resume.operation),
        ProjectState::Restoring(restore) => (Code::RestoreInProgress, "a restore", &restore.operation),
        ProjectState::Resting(_) | ProjectState::Paused(_) | ProjectState::Broken(_) => match &project.checkpointing {
            Some(making) => (Code::OperationInProgress, "a checkpoint", &making.operation),
            None => return Ok(()),
        },
    };
    Err(Refusal::new(code, format!("{kind} of project '{}' is in progress", project.name))
        .hint(format!("fermatactl op show {operation}"))
        .details(serde_json::json!({ "operation_id": operation })))
}

/// Refuses unless agents may be started. A checkpoint in progress beside the agents does not matter.
pub(super) fn refuse_unless_startable(project: &Project) -> Result<(), Refusal> {
    match &*project.state {
        ProjectState::Resting(_) => Ok(()),
        ProjectState::Paused(_) => {
            Err(Refusal::new(Code::ProjectPaused, format!("project '{}' is paused", project.name))
                .hint(format!("fermatactl resume {}", project.name)))
        }
        ProjectState::Broken(broken) => Err(half_restored(project, broken)),
        ProjectState::Pausing(_) | ProjectState::Resuming(_) | ProjectState::Restoring(_) => {
            refuse_during_operation(project)
        }
    }
}

/// The refusal of what a project with half restored files cannot do.
pub(super) fn half_restored(project: &Project, broken: &BrokenRestore) -> Refusal {
    let text = format!(
        "the files of project '{}' are half restored: the restore of checkpoint {} was given up",
        project.name, broken.checkpoint
    );
    Refusal::new(Code::RestoreFailed, text)
        .hint(undo_restore_hint(project, broken.safety))
        .details(serde_json::json!({ "operation_id": broken.operation, "safety_checkpoint_id": broken.safety }))
}

/// The error of a restore that is given up.
pub(super) fn given_up(project: &Project, checkpoint: u64, safety: u64, tries: u32, error: &ErrorObject) -> Refusal {
    let text = format!(
        "checkpoint {checkpoint} of project '{}' is only half restored, after {tries} attempts: {}",
        project.name, error.message
    );
    Refusal::new(Code::RestoreFailed, text)
        .hint(undo_restore_hint(project, safety))
        .details(serde_json::json!({ "safety_checkpoint_id": safety, "cause": error.data.code }))
}

fn undo_restore_hint(project: &Project, safety: u64) -> String {
    format!(
        "once the cause is removed: fermatactl checkpoint restore {0} {safety} brings the files of before the restore back",
        project.name
    )
}
