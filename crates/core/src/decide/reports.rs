//! Reports of agents and answers of people: progress, usage, tasks, questions, context.

use fermata_protocol::agent::Progress;
use fermata_protocol::budget::Usage;
use fermata_protocol::context::FlashSaveResult;
use fermata_protocol::event::Event;
use fermata_protocol::question::QuestionView;
use fermata_protocol::task::Phase;
use fermata_protocol::task::{TaskStatus, TaskView};
use fermata_protocol::{AgentName, Code, Refusal, UnixMillis};

use super::checks::{agent, refuse_during_operation};
use super::project::phase_change;
use crate::apply::apply;
use crate::budget;
use crate::command::Decision;
use crate::effect::Effect;
use crate::project::Project;

/// The longest title of a task, text of a question or of a progress report, in bytes.
pub const MAX_TEXT_BYTES: usize = 16 << 10;

fn check_text(what: &str, text: &str) -> Result<(), Refusal> {
    if text.trim().is_empty() {
        return Err(Refusal::new(Code::InvalidParams, format!("the {what} is empty")));
    }
    if text.len() > MAX_TEXT_BYTES {
        return Err(Refusal::new(
            Code::TooLarge,
            format!("the {what} has {} bytes, more than {MAX_TEXT_BYTES}", text.len()),
        ));
    }
    Ok(())
}

fn check_percent(percent: Option<f64>) -> Result<(), Refusal> {
    match percent {
        Some(p) if !(0.0..=100.0).contains(&p) => {
            Err(Refusal::new(Code::InvalidParams, format!("percent is {p}, outside 0 to 100")))
        }
        Some(_) | None => Ok(()),
    }
}

pub(super) fn progress(
    project: &Project,
    name: AgentName,
    progress: Progress,
    phase: Option<Phase>,
) -> Result<Decision, Refusal> {
    let found = agent(project, &name)?;
    check_percent(progress.percent)?;
    if let Some(message) = &progress.message {
        check_text("message", message)?;
    }
    let progress = match (&found.progress, &progress) {
        // A heartbeat: the last report remains.
        (Some(before), Progress { percent: None, message: None, units_done: None, reported_at }) => {
            Progress { reported_at: *reported_at, ..before.clone() }
        }
        // A report without units keeps the last count, from which later reports are counted.
        (Some(before), _) => Progress { units_done: progress.units_done.or(before.units_done), ..progress },
        (None, _) => progress,
    };
    let mut events = vec![Event::AgentProgressed { agent: name, progress }];
    events.extend(phase_change(project, phase));
    Ok(Decision::events(events))
}

pub(super) fn usage(project: &Project, name: AgentName, usage: Usage) -> Result<Decision, Refusal> {
    agent(project, &name)?;
    let event = Event::AgentUsed { agent: name, usage };
    let mut after = project.clone();
    // No budget depends on the time of the report.
    apply(&mut after, &event, UnixMillis(0));
    let pauses = budget::calls_for_pause(project, &after);
    let decision = Decision::events(vec![event]);
    Ok(if pauses { decision.then(Effect::PauseForBudget {}) } else { decision })
}

pub(super) fn save_state(project: &Project, name: AgentName, bytes: u64) -> Result<Decision, Refusal> {
    agent(project, &name)?;
    Ok(Decision::events(vec![Event::AgentStateSaved { agent: name, bytes }]))
}

/// The members of a task to set.
pub(super) struct TaskChange {
    pub(super) agent: Option<AgentName>,
    pub(super) id: Option<u64>,
    pub(super) title: Option<String>,
    pub(super) status: Option<TaskStatus>,
    pub(super) percent: Option<f64>,
}

pub(super) fn put_task(project: &Project, change: TaskChange, now: UnixMillis) -> Result<Decision, Refusal> {
    if let Some(name) = &change.agent {
        agent(project, name)?;
    }
    check_percent(change.percent)?;
    if let Some(title) = &change.title {
        check_text("title", title)?;
    }
    let task = match change.id {
        None => TaskView {
            id: project.counters.task + 1,
            agent: change.agent,
            title: change.title.ok_or_else(|| Refusal::new(Code::InvalidParams, "a new task needs a 'title'"))?,
            status: change.status.unwrap_or_default(),
            percent: change.percent,
            created_at: now,
            updated_at: now,
        },
        Some(id) => {
            let mut task = project
                .tasks
                .get(&id)
                .ok_or_else(|| {
                    Refusal::new(Code::TaskNotFound, format!("project '{}' has no task {id}", project.name))
                        .hint(format!("fermatactl task ls {}", project.name))
                })
                .map(|task| (**task).clone())?;
            if let Some(title) = change.title {
                task.title = title;
            }
            if let Some(status) = change.status {
                task.status = check_task_transition(&task, status)?;
            }
            task.percent = change.percent.or(task.percent);
            task.updated_at = now;
            task
        }
    };
    Ok(Decision::events(vec![Event::TaskChanged { task }]))
}

/// Completed and cancelled tasks may only be reopened (`pending`, `in_progress`), not failed.
fn check_task_transition(task: &TaskView, to: TaskStatus) -> Result<TaskStatus, Refusal> {
    use TaskStatus::{Cancelled, Completed, Failed, InProgress, Pending, WaitingForInput};
    let allowed = match (task.status, to) {
        (from, to) if from == to => true,
        (Pending | InProgress | WaitingForInput | Failed, _) => true,
        (Completed | Cancelled, Pending | InProgress) => true,
        (Completed | Cancelled, Failed | WaitingForInput | Completed | Cancelled) => false,
    };
    if allowed {
        return Ok(to);
    }
    Err(Refusal::new(
        Code::InvalidTransition,
        format!("task {} is {} and cannot become {}", task.id, task.status.as_str(), to.as_str()),
    )
    .hint("reopen it first: in_progress"))
}

pub(super) fn ask(
    project: &Project,
    name: AgentName,
    text: String,
    choices: Vec<String>,
    now: UnixMillis,
) -> Result<Decision, Refusal> {
    agent(project, &name)?;
    check_text("question", &text)?;
    if choices.len() > 64 {
        return Err(Refusal::new(Code::TooLarge, format!("{} choices are more than 64", choices.len())));
    }
    for choice in &choices {
        check_text("choice", choice)?;
    }
    let question = QuestionView {
        project: project.name.clone(),
        id: project.counters.question + 1,
        agent: name,
        text,
        choices,
        asked_at: now,
        answer: None,
        answered_at: None,
    };
    Ok(Decision::events(vec![Event::QuestionAsked { question }]))
}

pub(super) fn answer(project: &Project, id: u64, answer: String, now: UnixMillis) -> Result<Decision, Refusal> {
    let question = project.questions.get(&id).ok_or_else(|| {
        Refusal::new(Code::QuestionNotFound, format!("project '{}' has no question {id}", project.name))
            .hint("fermatactl inbox")
    })?;
    if let Some(earlier) = &question.answer {
        return Err(Refusal::new(
            Code::QuestionAnswered,
            format!("question {}/{id} was answered already", project.name),
        )
        .details(serde_json::json!({ "answer": earlier })));
    }
    check_text("answer", &answer)?;
    if !question.choices.is_empty() && !question.choices.contains(&answer) {
        return Err(Refusal::new(
            Code::InvalidParams,
            format!("'{}' is none of the choices of question {}/{id}", answer, project.name),
        )
        .hint(format!("choose one of: {}", question.choices.join(", "))));
    }
    let agent = question.agent.clone();
    Ok(Decision::events(vec![Event::QuestionAnswered { id, agent, answer, answered_at: now }]))
}

pub(super) fn add_context(project: &Project, name: AgentName, items: u64, tokens: u64) -> Result<Decision, Refusal> {
    agent(project, &name)?;
    Ok(Decision::events(vec![Event::ContextAdded { agent: name, items, tokens }]))
}

pub(super) fn flash_save(project: &Project, results: Vec<(AgentName, FlashSaveResult)>) -> Result<Decision, Refusal> {
    refuse_during_operation(project)?;
    let events = results.into_iter().map(|(agent, result)| Event::FlashSaved { agent, result });
    Ok(Decision::events(events.collect()))
}
